"""Agents on the hosts (distclip.cluster.agent): start them over ssh, send them requests, end them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from distclip.cluster import agent
from distclip.cluster.answers import facts_form, fits
from distclip.cluster.checks import Facts
from distclip.cluster.hosts import Job
from distclip.cluster.mpirun import variables

LOOK_S = agent.LOOK_S + 5  # ssh gives up after 5 s, and an agent answers in time or not at all
CONNECT_S = 2 * agent.CONNECT_S + 2
STOP_S = 3.0
LAUNCHER = ""  # among the hosts: the launching machine, which need not run a rank
start = functools.partial(asyncio.create_subprocess_exec, start_new_session=True)
T = TypeVar("T")


async def within(timeout_s: float, task: Coroutine[Any, Any, T]) -> T | None:
    """The result of a coroutine; None after a timeout."""
    with contextlib.suppress(asyncio.TimeoutError):
        return await asyncio.wait_for(task, timeout_s)
    return None


class Agent:
    """The process of an agent. It answers one request after the other."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process
        self._timed_out = False  # a late answer must not be taken for that of the next request
        self._makes_no_sense = False

    async def request(self, timeout_s: float, request: Facts, form: Any) -> Facts | None:
        """The answer to a request; None after a timeout, or if it has another form, and to every later request."""
        answer = None if self._timed_out else await within(timeout_s, self._request(request))
        self._makes_no_sense = answer is not None and not fits(answer, form)
        self._timed_out = answer is None or self._makes_no_sense
        return None if self._timed_out else answer

    async def _request(self, request: Facts) -> Facts | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        with contextlib.suppress(OSError):
            await self._process.stdin.drain()
        with contextlib.suppress(ValueError, RecursionError):  # a line without an end; no JSON
            while line := (await self._process.stdout.readline()).decode(errors="replace"):
                if agent.MARK in line:
                    answer: Facts = json.loads(line.partition(agent.MARK)[2])
                    return answer
        return None

    async def end(self) -> tuple[int | None, str]:
        """End it; return its exit code (None if it still ran, 0 if its answer made no sense) and its standard error."""
        code = await within(0.5, self._process.wait())
        code = 0 if self._makes_no_sense else code
        await end_process(self._process)
        assert self._process.stderr is not None
        error = await within(1, self._process.stderr.read())
        return code, (error or b"").decode(errors="replace")

    async def close(self) -> None:
        """Close its standard input, at which it ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await within(1, self._process.wait())
        await end_process(self._process)


@contextlib.asynccontextmanager
async def start_agents(lines: Mapping[str, Sequence[str]]) -> AsyncIterator[dict[str, Agent]]:
    """Start an agent on each host by its command line, and end them all."""
    pipe = asyncio.subprocess.PIPE
    agents: dict[str, Agent] = {}
    try:
        for host, line in lines.items():
            agents[host] = Agent(await start(*line, stdin=pipe, stdout=pipe, stderr=pipe, limit=2**24))
        yield agents
    finally:
        await asyncio.gather(*(agent.close() for agent in agents.values()))


def local_line(python: str) -> list[str]:
    """The command line of an agent on this machine. A shell reports a missing Python as on other hosts."""
    return ["/bin/sh", "-c", 'exec "$0" "$@"', python, "-c", agent.START]


async def look(
    agents: Mapping[str, Agent], job: Job, files: Sequence[str] = (), names: Sequence[str] = ()
) -> tuple[dict[str, Facts], dict[str, tuple[int | None, str]]]:
    """The facts of each host; and of each host that does not answer, the exit code and the standard error."""
    request: Facts = {"do": "look", "source": Path(agent.__file__).read_text(), "mpirun": job.mpirun, "cwd": job.cwd}
    request |= {"env": variables(job), "files": files, "names": names}
    requests = {host: request | {"probe": host != LAUNCHER} for host in agents}
    facts = await ask(agents, LOOK_S, requests, facts_form(files, names))
    silent = [host for host in agents if host not in facts]
    ends = await asyncio.gather(*(agents[host].end() for host in silent))
    return facts, dict(zip(silent, ends, strict=True))


async def ask(
    agents: Mapping[str, Agent], timeout_s: float, requests: Mapping[str, Facts], form: Any
) -> dict[str, Facts]:
    """The answers of a form to requests to several hosts, of those that answer."""
    tasks = (agents[host].request(timeout_s, request, form) for host, request in requests.items())
    answers = zip(requests, await asyncio.gather(*tasks), strict=True)
    return {host: answer for host, answer in answers if answer is not None}


async def run_bounded(line: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
    """Run a command; return its exit code (None after a timeout) and its output."""
    nothing, same = asyncio.subprocess.DEVNULL, asyncio.subprocess.STDOUT
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = await start(*line, stdin=nothing, stdout=output, stderr=same)
        try:
            code = await within(timeout_s, process.wait())
        finally:
            await end_process(process)
        output.seek(0)
        return code, output.read()


async def end_process(process: asyncio.subprocess.Process) -> None:
    """End a process and its group. SIGTERM comes first, so that mpirun ends its ranks."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
                await within(STOP_S, process.wait())
