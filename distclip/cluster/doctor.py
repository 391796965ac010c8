"""Find what would stop a run, or slow it down, on this machine or on several hosts.

    distclip doctor                                       this machine, and a run with two ranks
    distclip doctor --hostfile hosts.json train.py data   all hosts at once, and a run over them that measures the links

FILES are what every host must have alike: the script, the data. Without a failure the exit code is 0, with one it is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from distclip.cluster import agent, checks
from distclip.cluster.checks import Facts, Finding
from distclip.cluster.hosts import Cluster, Job, add_host_arguments, is_here, job_of, mpirun_line, ssh_line, variables
from distclip.openmpi import find_mpirun

LOOK_S = agent.LOOK_S + 5  # ssh gives up after 5 s, and an agent answers in time or not at all
CONNECT_S = 2 * agent.CONNECT_S + 2
RUN_S, PAIR_S = 40.0, 5.0  # for a run that measures, and for each pair of hosts in it
STOP_S = 3.0
SELF_TEST = "distclip.cluster.selftest"  # which needs MLX, and so runs as a process of its own
HARMLESS = ("names", "file", "route")  # failures that do not stop Open MPI
ORDER = ["ssh", "python", "distclip", "mlx", "kernel", "mpi4py", "Open MPI", "hostname", "folder", "file"]
ORDER += ["network", "connections", "route", "names", "library", "norm", "run", "link", "bytes"]
WIDTH = 100


@dataclass
class Examination:
    """What the doctor has found.

    Attributes:
        findings: one for each host and check.
        links: between two hosts, ``latency_us`` and ``bandwidth_gbit_s``.
        left_out: what was not done, since a check before it failed.
    """

    findings: list[Finding] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)
    left_out: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``distclip doctor``."""
    add_host_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help='write the findings as JSON; "-": instead of the table')
    parser.add_argument("files", nargs="*", metavar="FILES", help="the script and the data, which all hosts must have")


def run(args: argparse.Namespace) -> int:
    """Examine this machine or the hosts, and tell; returns the exit code."""
    several = args.hosts is not None or args.hostfile is not None
    try:
        job = job_of(args) if several else _job_here(args)
    except ValueError as error:
        args.error(str(error))
    try:
        found = asyncio.run(_examine(job, args.files, measure=True) if several else _examine_here(job))
    except KeyboardInterrupt:  # what was started has been ended
        return 130
    found.findings.sort(key=_place)
    if args.json is not None:
        text = json.dumps({"healthy": _healthy(found), **asdict(found)}, indent=2) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            Path(args.json).write_text(text)
    if args.json != "-":
        print("\n".join(table(found)))
    return 0 if _healthy(found) else 1


def preflight(job: Job, files: Sequence[str]) -> list[Finding]:
    """What can be found without a run: ssh, what is installed, the files, the connections between all hosts.

    Args:
        job: the run to come.
        files: what every host must have alike, from the job's folder.
    """
    return sorted(asyncio.run(_examine(job, files, measure=False)).findings, key=_place)


def _job_here(args: argparse.Namespace) -> Job:
    """A run with two ranks on this machine."""
    if args.files:
        raise ValueError("FILES are compared between hosts: name them with --hosts or --hostfile")
    python, mpirun = args.python or sys.executable, args.mpirun or find_mpirun()
    return Job(Cluster(()), 2, python, mpirun, args.cwd or os.getcwd(), env=tuple(args.env))


def _healthy(found: Examination) -> bool:
    return all(finding.ok for finding in found.findings)


# ---------------------------------------------------------------------------------------------- the examinations


async def _examine_here(job: Job) -> Examination:
    host = socket.gethostname()
    found = Examination()
    async with _agents({host: _line_here(job.python)}) as asked:
        facts, silent = await _look(asked, _request(job, [], []) | {"probe": True})
    if silent:
        found.findings.append(checks.unreached(host, job, *silent[host]))
        return found
    found.findings += checks.of_installed(job, facts, facts[host])
    if _healthy(found):
        line = [job.mpirun, "-n", "2", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
        if os.getuid() == 0:
            line.append("--allow-run-as-root")
        await _try(found, job, [host, host], [*line, job.python, "-m", SELF_TEST], facts[host]["mpirun"])
    else:
        found.left_out = "the run with two ranks"
    return found


async def _examine(job: Job, files: Sequence[str], *, measure: bool) -> Examination:
    paths = [os.path.join(job.cwd, file) for file in files]
    names = [host.name.rpartition("@")[2] for host in job.cluster.hosts] if measure else []
    found = Examination()
    hosts = job.cluster.hosts
    is_near = await asyncio.gather(*(asyncio.to_thread(is_here, host) for host in hosts))  # names may resolve slowly
    near = {
        host.name for host, yes in zip(hosts, is_near, strict=True) if yes
    }  # Open MPI does not use ssh to get there
    lines = {
        host.name: _line_here(job.python) if host.name in near else ssh_line(host, [job.python, "-c", agent.START])
        for host in hosts
    }
    if shutil.which("ssh") is None and len(near) < len(lines):
        remedy = "install OpenSSH's client, such as: sudo apt install openssh-client"
        found.findings.append(Finding(socket.gethostname(), "ssh", False, "there is no ssh here", remedy))
        return found
    async with _agents(lines) as asked, _agents({"": _line_here(sys.executable)}) as own:
        request = _request(job, paths, names)
        looks = (_look(asked, request | {"probe": True}), _look(own, request | {"probe": False}))
        (facts, silent), (mine, dumb) = await asyncio.gather(*looks)
        if dumb:
            found.findings.append(checks.unreached(socket.gethostname(), job, *dumb[""]))
            return found
        here = mine[""]
        for host in asked:
            if host in silent:
                found.findings.append(checks.unreached(host, job, *silent[host]))
            elif host not in near:
                found.findings.append(Finding(host, "ssh", True, "no password asked"))
        found.findings += checks.of_installed(job, facts, here)
        found.findings += checks.of_hosts(job, facts, here, paths)
        connected = await _connect({**asked, **own}, job, facts, here)
        found.findings += checks.of_network(job, facts, here, connected)
        if measure:
            found.findings += checks.of_names(job, facts, here)
            if all(finding.ok or finding.check.startswith(HARMLESS) for finding in found.findings):
                await _measure(found, asked, job, facts, here)
            else:
                found.left_out = "the run that measures the links"
    return found


async def _measure(
    found: Examination, asked: Mapping[str, Agent], job: Job, facts: Mapping[str, Facts], here: Facts
) -> None:
    """A real run with one rank on each host."""
    hosts = list(facts)
    single = Cluster(tuple(replace(host, slots=1) for host in job.cluster.hosts), job.cluster.env)
    line = mpirun_line(replace(job, cluster=single, ranks=len(hosts)), [job.python, "-m", SELF_TEST, "links"])
    before = await _count(asked)
    await _try(found, job, hosts, line, here["mpirun"])
    after = await _count(asked)
    if found.links:
        found.findings += checks.of_bytes(job, facts, before, after)


async def _try(found: Examination, job: Job, hosts: Sequence[str], line: Sequence[str], version: str) -> None:
    """Run the trial, and add what its ranks say; with what mpirun says when they do not come to its end."""
    pairs = len(hosts) * (len(hosts) - 1) / 2
    limit_s = RUN_S + PAIR_S * pairs
    code, output = await _bounded(line, limit_s)
    said: dict[int, Facts] = {}
    for one in _marked(output):
        if "rank" in one:
            said.setdefault(one["rank"], {}).update(one)
        else:
            low, high = (hosts[rank] for rank in one.pop("link"))
            found.links.append({"hosts": [low, high], **one})
    new = list(dict.fromkeys(checks.of_ranks(job, version, hosts, said)))  # two ranks of one host find the same
    new += checks.of_links(found.links)
    found.findings += new
    unheard = [host for rank, host in enumerate(hosts) if "norm" not in said.get(rank, {})]
    if (code != 0 or unheard) and all(finding.ok for finding in new):
        ended = f"ended with exit code {code}" if code is not None else f"took longer than {limit_s:g} s and was ended"
        silence = f"; no norm came from {', '.join(dict.fromkeys(unheard))}" if unheard else ""
        lines = [text.strip(" -\0") for text in output.splitlines() if agent.SELF_TEST_MARK not in text]
        last = "".join(f" / {text}" for text in [text for text in lines if text][-3:])
        remedy = f"see all that it says: {shlex.join(line)}"
        found.findings.append(
            Finding(", ".join(dict.fromkeys(hosts)), "run", False, f"mpirun {ended}{silence}{last}", remedy)
        )


def _marked(output: str) -> Iterator[dict[str, Any]]:
    """What ranks have said, wherever it stands in the output: mpirun may join lines of several ranks."""
    for part in output.split(agent.SELF_TEST_MARK)[1:]:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.JSONDecoder().raw_decode(part)[0]


async def _bounded(line: Sequence[str], limit_s: float) -> tuple[int | None, str]:
    """Run a command for a limited time: its exit code (None if it was ended) and all that it wrote."""
    process = await asyncio.create_subprocess_exec(
        *line,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    output = bytearray()

    async def read() -> None:
        assert process.stdout is not None
        while part := await process.stdout.read(2**16):
            output.extend(part)

    code = None
    try:
        await asyncio.wait_for(read(), limit_s)
        code = await asyncio.wait_for(process.wait(), STOP_S)
    except asyncio.TimeoutError:
        pass
    finally:
        await _end(process)
    return code, output.decode(errors="replace")


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process that leads its group: mpirun takes its ranks along when it is asked first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, asyncio.TimeoutError):
                os.killpg(process.pid, number)
                await asyncio.wait_for(process.wait(), STOP_S)


# ---------------------------------------------------------------------------------------------------- the agents


class Agent:
    """An agent on a host, from its start to its end: one question after the other."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process
        self._lost = False  # an answer that comes late is none to the next request

    async def ask(self, limit_s: float, **request: Any) -> Facts | None:
        """The answer to a request; None if there is none in time, and from then on."""
        if not self._lost:
            with contextlib.suppress(asyncio.TimeoutError, OSError):
                return await asyncio.wait_for(self._ask(request), limit_s)
        self._lost = True
        return None

    async def _ask(self, request: dict[str, Any]) -> Facts | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        await self._process.stdin.drain()
        while line := (await self._process.stdout.readline()).decode(errors="replace"):
            if line.startswith(agent.MARK):
                found: Facts = json.loads(line[len(agent.MARK) :])
                return found
        return None

    async def last_words(self) -> tuple[int | None, str]:
        """Its exit code, None if it still runs, and what it wrote to standard error. Ends it."""
        code = None
        with contextlib.suppress(asyncio.TimeoutError):
            code = await asyncio.wait_for(self._process.wait(), 0.5)
        await _end(self._process)
        assert self._process.stderr is not None
        error = b""
        with contextlib.suppress(asyncio.TimeoutError):
            error = await asyncio.wait_for(self._process.stderr.read(), 1)
        return code, error.decode(errors="replace")

    async def leave(self) -> None:
        """Let it end, which it does when there are no more questions."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.wait(), 1)
        await _end(self._process)


@contextlib.asynccontextmanager
async def _agents(lines: Mapping[str, Sequence[str]]) -> AsyncIterator[dict[str, Agent]]:
    """Start an agent by each line, and end them all."""
    pipe = asyncio.subprocess.PIPE
    started: dict[str, Agent] = {}
    try:
        for host, line in lines.items():
            process = await asyncio.create_subprocess_exec(
                *line, stdin=pipe, stdout=pipe, stderr=pipe, limit=2**24, start_new_session=True
            )
            started[host] = Agent(process)
        yield started
    finally:
        await asyncio.gather(*(one.leave() for one in started.values()))


def _request(job: Job, paths: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """What every agent is asked first. Its environment is that of a rank."""
    return {
        "do": "look",
        "source": Path(agent.__file__).read_text(),
        "env": variables(job),
        "mpirun": job.mpirun,
        "files": list(paths),
        "names": list(names),
        "cwd": job.cwd,
    }


async def _look(
    asked: Mapping[str, Agent], request: dict[str, Any]
) -> tuple[dict[str, Facts], dict[str, tuple[int | None, str]]]:
    """What each agent sees; and of those that do not answer, the exit code and what they wrote to standard error."""
    answers = await asyncio.gather(*(one.ask(LOOK_S, **request) for one in asked.values()))
    facts = {host: answer for host, answer in zip(asked, answers, strict=True) if answer is not None}
    silent = [host for host in asked if host not in facts]
    words = await asyncio.gather(*(asked[host].last_words() for host in silent))
    return facts, dict(zip(silent, words, strict=True))


def _line_here(python: str) -> list[str]:
    """An agent on this machine. The shell tells of a Python that is missing as it does on other hosts."""
    return ["/bin/sh", "-c", 'exec "$0" "$@"', python, "-c", agent.START]


async def _connect(
    asked: Mapping[str, Agent], job: Job, facts: Mapping[str, Facts], here: Facts
) -> dict[str, dict[str, Facts]]:
    """From each machine to each other one, all at once: the addresses of a connection, or the error."""
    machines = checks.everyone(facts, here)

    async def one(start: str) -> dict[str, Facts]:
        ends = {end: checks.ways(job, machines[start], to) for end, to in machines.items() if end != start}
        answer = await asked[start if start in facts else ""].ask(CONNECT_S, do="connect", to=ends)
        return answer or {}

    return dict(zip(machines, await asyncio.gather(*map(one, machines)), strict=True))


async def _count(asked: Mapping[str, Agent]) -> dict[str, Facts]:
    """How many bytes the interfaces of each host have carried."""
    answers = await asyncio.gather(*(one.ask(CONNECT_S, do="count") for one in asked.values()))
    return {host: answer["bytes"] for host, answer in zip(asked, answers, strict=True) if answer is not None}


# ----------------------------------------------------------------------------------------------------- the table


def table(found: Examination) -> list[str]:
    """The lines that a person reads: one for each check, and at the end what to do."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in found.findings:
        one = finding.host if finding.check == "link" else ""
        groups.setdefault((finding.check, one), []).append(finding)
    wide = max(len(check) for check, _ in groups)
    lines = []
    for (check, _), group in groups.items():
        failed = [finding for finding in group if not finding.ok]
        if failed and check != "link":
            text = ", ".join(dict.fromkeys(finding.host for finding in failed))
        elif check != "link" and len({finding.found for finding in group}) == 1:
            text = group[0].found
        else:
            text = "; ".join(f"{finding.host}: {finding.found}" for finding in group)
        start = f"{'FAILED' if failed else 'ok':6}  {check:{wide}}  "
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        )
    wrong = [finding for finding in found.findings if not finding.ok]
    if found.left_out:
        lines += ["", f"Left out, since it would fail: {found.left_out}."]
    if wrong:
        lines += ["", f"What to do ({len(wrong)} of {len(found.findings)} checks failed):"]
    for finding in wrong:
        lines += [f"  {finding.host}, {finding.check}: {finding.found}", f"      -> {finding.remedy}"]
    return lines


def _place(finding: Finding) -> int:
    return ORDER.index(next(check for check in ORDER if finding.check.startswith(check)))
