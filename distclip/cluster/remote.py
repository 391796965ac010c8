"""Agents on the hosts (distclip.cluster.agent): start them over ssh, send them requests, end them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distclip.cluster import agent
from distclip.cluster.checks import Facts
from distclip.cluster.hosts import Job
from distclip.cluster.mpirun import variables

LOOK_S = agent.LOOK_S + 5  # ssh gives up after 5 s, and an agent answers in time or not at all
CONNECT_S = 2 * agent.CONNECT_S + 2
STOP_S = 3.0


class Agent:
    """The process of an agent. It answers one request after the other."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process
        self._timed_out = False  # a late answer must not be taken for that of the next request

    async def request(self, timeout_s: float, **request: Any) -> Facts | None:
        """The answer to a request; None after a timeout, and to every later request."""
        if not self._timed_out:
            with contextlib.suppress(asyncio.TimeoutError, OSError):
                return await asyncio.wait_for(self._request(request), timeout_s)
        self._timed_out = True
        return None

    async def _request(self, request: dict[str, Any]) -> Facts | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        await self._process.stdin.drain()
        while line := (await self._process.stdout.readline()).decode(errors="replace"):
            if line.startswith(agent.MARK):
                answer: Facts = json.loads(line[len(agent.MARK) :])
                return answer
        return None

    async def end(self) -> tuple[int | None, str]:
        """End it; return its exit code (None if it still ran) and its standard error."""
        code = None
        with contextlib.suppress(asyncio.TimeoutError):
            code = await asyncio.wait_for(self._process.wait(), 0.5)
        await end_process(self._process)
        assert self._process.stderr is not None
        error = b""
        with contextlib.suppress(asyncio.TimeoutError):
            error = await asyncio.wait_for(self._process.stderr.read(), 1)
        return code, error.decode(errors="replace")

    async def close(self) -> None:
        """Close its standard input, at which it ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.wait(), 1)
        await end_process(self._process)


@contextlib.asynccontextmanager
async def start_agents(lines: Mapping[str, Sequence[str]]) -> AsyncIterator[dict[str, Agent]]:
    """Start an agent on each host by its command line, and end them all."""
    pipe = asyncio.subprocess.PIPE
    agents: dict[str, Agent] = {}
    try:
        for host, line in lines.items():
            process = await asyncio.create_subprocess_exec(
                *line, stdin=pipe, stdout=pipe, stderr=pipe, limit=2**24, start_new_session=True
            )
            agents[host] = Agent(process)
        yield agents
    finally:
        await asyncio.gather(*(agent.close() for agent in agents.values()))


def local_line(python: str) -> list[str]:
    """The command line of an agent on this machine. A shell reports a missing Python as on other hosts."""
    return ["/bin/sh", "-c", 'exec "$0" "$@"', python, "-c", agent.START]


def look_request(job: Job, paths: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """The first request to every agent: describe the files at the paths, resolve the host names."""
    return {
        "do": "look",
        "source": Path(agent.__file__).read_text(),
        "env": variables(job),
        "mpirun": job.mpirun,
        "files": list(paths),
        "names": list(names),
        "cwd": job.cwd,
    }


async def look(
    agents: Mapping[str, Agent], request: dict[str, Any]
) -> tuple[dict[str, Facts], dict[str, tuple[int | None, str]]]:
    """The facts of each host; and of each host that does not answer, the exit code and the standard error."""
    answers = await asyncio.gather(*(agent.request(LOOK_S, **request) for agent in agents.values()))
    facts = {host: answer for host, answer in zip(agents, answers, strict=True) if answer is not None}
    silent = [host for host in agents if host not in facts]
    ends = await asyncio.gather(*(agents[host].end() for host in silent))
    return facts, dict(zip(silent, ends, strict=True))


async def count_bytes(agents: Mapping[str, Agent]) -> dict[str, Facts]:
    """How many bytes each interface of each host has carried."""
    answers = await asyncio.gather(*(agent.request(CONNECT_S, do="count") for agent in agents.values()))
    return {host: answer["bytes"] for host, answer in zip(agents, answers, strict=True) if answer is not None}


async def run_bounded(line: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
    """Run a command; return its exit code (None after a timeout) and its output."""
    nothing, same = asyncio.subprocess.DEVNULL, asyncio.subprocess.STDOUT
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = await asyncio.create_subprocess_exec(
            *line, stdin=nothing, stdout=output, stderr=same, start_new_session=True
        )
        code = None
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                code = await asyncio.wait_for(process.wait(), timeout_s)
        finally:
            await end_process(process)
        output.seek(0)
        return code, output.read()


async def end_process(process: asyncio.subprocess.Process) -> None:
    """End a process and its group. SIGTERM comes first, so that mpirun ends its ranks."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, asyncio.TimeoutError):
                os.killpg(process.pid, number)
                await asyncio.wait_for(process.wait(), STOP_S)
