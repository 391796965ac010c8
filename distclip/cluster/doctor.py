"""Find what would stop a run, or slow it down, on this machine or on several hosts.

    distclip doctor                                       this machine, and a run with two ranks
    distclip doctor --hostfile hosts.json train.py data   all hosts at once, and a run over them that measures the links

FILES must be the same on all hosts: the script, the data. The exit code is 0 if every check passed, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import shlex
import shutil
import socket
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path

from distclip.cluster import agent, checks, network, remote
from distclip.cluster.answers import CONNECTED, COUNTS, LINK, LOADED, NOT_LOADED, RANK, fits
from distclip.cluster.checks import Facts, Finding, failed, passed
from distclip.cluster.hosts import Cluster, Job, add_host_arguments, job_of
from distclip.cluster.mpirun import AS_ROOT, is_here, mpirun_line, ssh_line
from distclip.cluster.output import write
from distclip.cluster.remote import LAUNCHER, Agent, local_line, start_agents
from distclip.openmpi import find_mpirun

RUN_S, PAIR_S = 40.0, 5.0  # the timeout of a self-test, and what each pair of hosts adds to it
SELF_TEST = "distclip.cluster.selftest"  # it needs MLX, and so runs as a process of its own
HARMLESS = ("names", "file", "route")  # failures that do not stop Open MPI
ORDER = ["ssh", "python", "distclip", "mlx", "kernel", "mpi4py", "Open MPI", "variables", "hostname", "folder", "file"]
ORDER += ["network", "connections", "route", "names", "library", "norm", "run", "link", "bytes"]
KEYS = ("host", "check", "ok", "found", "remedy")  # of a finding in JSON
wrap = partial(textwrap.wrap, width=100, break_long_words=False, break_on_hyphens=False)


@dataclass
class Diagnosis:
    """The results of the doctor: a finding for each host and check."""

    findings: list[Finding] = field(default_factory=list)
    links: list[Facts] = field(default_factory=list)  # each with ``hosts``, ``latency_us`` and ``bandwidth_gbit_s``
    left_out: str = ""  # what was not done, since an earlier check failed

    @property
    def healthy(self) -> bool:
        return all(finding.ok for finding in self.findings)

    def to_json(self) -> str:
        findings = [dict(zip(KEYS, astuple(finding), strict=True)) for finding in self.findings]
        content = {"healthy": self.healthy, "findings": findings, "links": self.links, "left_out": self.left_out}
        return json.dumps(content, indent=2) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``distclip doctor``."""
    add_host_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help='write the findings as JSON; "-": instead of the table')
    parser.add_argument("files", nargs="*", metavar="FILES", help="the script and the data, which all hosts must have")


def run(args: argparse.Namespace) -> int:
    """Check this machine or the hosts, and print the findings; return the exit code."""
    several = args.hosts is not None or args.hostfile is not None
    try:
        job = job_of(args) if several else _local_job(args)
    except ValueError as error:
        args.error(str(error))
    try:
        diagnosis = asyncio.run(_diagnose_hosts(job, args.files, measure=True) if several else _diagnose_here(job))
    except KeyboardInterrupt:  # all that was started has ended
        return 130
    diagnosis.findings.sort(key=_place)
    shown = diagnosis.to_json() if args.json == "-" else "\n".join([*table(diagnosis), ""])
    if (lost := write(sys.stdout, shown)) is not None:
        write(sys.stderr, f"distclip doctor: standard output cannot be written ({lost.strerror})\n")
    if args.json not in (None, "-"):
        try:
            Path(args.json).write_text(diagnosis.to_json())
        except OSError as error:
            args.error(f"--json {args.json} cannot be written ({error.strerror})")
    return 0 if diagnosis.healthy else 1


def preflight(job: Job, files: Sequence[str]) -> list[Finding]:
    """The checks that need no run: ssh, what is installed, the files in the job's folder, the connections."""
    return sorted(asyncio.run(_diagnose_hosts(job, files, measure=False)).findings, key=_place)


def _local_job(args: argparse.Namespace) -> Job:
    """A run with two ranks on this machine."""
    if args.files:
        raise ValueError("FILES are compared between hosts: name them with --hosts or --hostfile")
    return Job(Cluster(()), 2, args.python, args.mpirun or find_mpirun(), args.cwd, env=tuple(args.env))


async def _diagnose_here(job: Job) -> Diagnosis:
    host = socket.gethostname()
    diagnosis = Diagnosis()
    async with start_agents({host: local_line(job.python)}) as agents:
        facts, silent = await remote.look(agents, job)
    if silent:
        diagnosis.findings.append(checks.unreached(host, job, *silent[host]))
        return diagnosis
    diagnosis.findings += checks.check_installed(job, facts, facts[host])
    diagnosis.findings += checks.check_variables(facts)
    if diagnosis.healthy:
        line = [job.mpirun, "-n", "2", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", *AS_ROOT]
        line += [job.python, "-m", SELF_TEST]
        await _run_self_test(diagnosis, job, [host, host], line, facts[host]["mpirun"])
    else:
        diagnosis.left_out = "the run with two ranks"
    return diagnosis


async def _diagnose_hosts(job: Job, files: Sequence[str], *, measure: bool) -> Diagnosis:
    diagnosis, hosts = Diagnosis(), job.cluster.hosts
    are_here = await asyncio.gather(*(asyncio.to_thread(is_here, host) for host in hosts))  # names may resolve slowly
    local = {host.name for host, here in zip(hosts, are_here, strict=True) if here}  # Open MPI uses no ssh there
    lines = {host.name: ssh_line(host, [job.python, "-c", agent.START]) for host in hosts}
    lines |= dict.fromkeys(local, local_line(job.python))
    if shutil.which("ssh") is None and len(local) < len(lines):
        remedy = "install OpenSSH's client, such as: sudo apt install openssh-client"
        diagnosis.findings.append(failed(socket.gethostname(), "ssh", "there is no ssh here", remedy))
        return diagnosis
    paths = [os.path.join(job.cwd, file) for file in files]
    async with start_agents({**lines, LAUNCHER: local_line(sys.executable)}) as agents:
        facts, silent = await remote.look(agents, job, paths, [host.address for host in hosts] if measure else [])
        if LAUNCHER in silent:
            diagnosis.findings.append(checks.unreached(socket.gethostname(), job, *silent[LAUNCHER]))
            return diagnosis
        here = facts.pop(LAUNCHER)
        for host in lines:
            if host in silent:
                diagnosis.findings.append(checks.unreached(host, job, *silent[host]))
            elif host not in local:
                diagnosis.findings.append(passed(host, "ssh", "no password asked"))
        diagnosis.findings += checks.check_installed(job, facts, here)
        if len(local) < len(lines):
            diagnosis.findings += checks.check_prefix(job, here)
        diagnosis.findings += checks.check_hosts(job, facts, here, paths)
        machines = {**agents, checks.label(here): agents[LAUNCHER]}
        requests = network.requests(job, checks.machines(facts, here))
        connected = await remote.ask(machines, remote.CONNECT_S, requests, CONNECTED)
        diagnosis.findings += network.check_network(job, facts, here, connected)
        if measure:
            diagnosis.findings += network.check_names(job, facts, here)
            diagnosis.findings += checks.check_variables(facts)  # init() warns of them in a run
            if all(finding.ok or finding.check.startswith(HARMLESS) for finding in diagnosis.findings):
                await _measure_links(diagnosis, agents, job, facts, here)
            else:
                diagnosis.left_out = "the run that measures the links"
    return diagnosis


async def _measure_links(
    diagnosis: Diagnosis, agents: Mapping[str, Agent], job: Job, facts: Mapping[str, Facts], here: Facts
) -> None:
    """Run the self-test with one rank on each host."""
    single = Cluster(tuple(replace(host, slots=1) for host in job.cluster.hosts), job.cluster.env)
    line = mpirun_line(replace(job, cluster=single, ranks=len(facts)), [job.python, "-m", SELF_TEST, "links"])
    count = {host: {"do": "count"} for host in facts}
    before = await remote.ask(agents, remote.CONNECT_S, count, COUNTS)
    await _run_self_test(diagnosis, job, list(facts), line, here["mpirun"])
    after = await remote.ask(agents, remote.CONNECT_S, count, COUNTS)
    if diagnosis.links:
        diagnosis.findings += network.check_bytes(job, facts, before, after)


async def _run_self_test(
    diagnosis: Diagnosis, job: Job, hosts: Sequence[str], line: Sequence[str], version: str
) -> None:
    """Run the self-test, and add the findings on its ranks; on mpirun itself, if it failed and no rank says why."""
    timeout_s = RUN_S + PAIR_S * math.comb(len(hosts), 2)
    code, output = await remote.run_bounded(line, timeout_s)
    reports, links = read_reports(output, hosts)
    diagnosis.links += links
    findings = list(dict.fromkeys(checks.check_ranks(job, version, hosts, reports)))  # equal for all ranks of a host
    findings += network.check_links(diagnosis.links)
    diagnosis.findings += findings
    silent = [host for rank, host in enumerate(hosts) if "norm" not in reports.get(rank, {})]
    if (code != 0 or silent) and all(finding.ok for finding in findings):
        ended = f"took longer than {timeout_s:g} s and was ended" if code is None else f"ended with exit code {code}"
        silence = f"; no norm came from {', '.join(dict.fromkeys(silent))}" if silent else ""
        message = f"mpirun {ended}{silence}{_last_lines(output)}"
        where, remedy = ", ".join(dict.fromkeys(hosts)), f"see its full output: {shlex.join(line)}"
        diagnosis.findings.append(failed(where, "run", message, remedy))


def read_reports(output: str, hosts: Sequence[str]) -> tuple[dict[int, Facts], list[Facts]]:
    """What ranks printed, by rank, and the links. What is not by the self-test is left out."""
    reports: dict[int, Facts] = {}
    links: list[Facts] = []
    for report in _marked(output):
        if fits(report, RANK) and 0 <= report["rank"] < len(hosts):
            reports.setdefault(report["rank"], {}).update(report)
        elif fits(report, LINK) and all(0 <= rank < len(hosts) for rank in report["link"]):
            low, high = (hosts[rank] for rank in report.pop("link"))
            links.append({"hosts": [low, high], **report})
    return {rank: report for rank, report in reports.items() if fits(report, (LOADED, NOT_LOADED))}, links


def _marked(output: str) -> Iterator[Facts]:
    """What ranks printed, anywhere in the output: mpirun may join lines of several ranks."""
    for text in output.split(agent.SELF_TEST_MARK)[1:]:
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            yield json.JSONDecoder().raw_decode(text)[0]


def _last_lines(output: str) -> str:
    lines = [line.strip(" -\0") for line in output.splitlines() if agent.SELF_TEST_MARK not in line]
    return "".join(f" / {line}" for line in [line for line in lines if line][-3:])


def table(diagnosis: Diagnosis) -> list[str]:
    """The lines that a person reads: one for each check, then what to do."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in diagnosis.findings:
        groups.setdefault((finding.check, finding.host if finding.check == "link" else ""), []).append(finding)
    width = max(len(check) for check, _ in groups)
    lines = []
    for (check, _), findings in groups.items():
        start = f"{_state(findings):6}  {check:{width}}  "
        lines += wrap(_row(check, findings), initial_indent=start, subsequent_indent=" " * len(start))
    if diagnosis.left_out:
        lines += ["", f"Left out, since it would fail: {diagnosis.left_out}."]
    failures = [finding for finding in diagnosis.findings if not finding.ok]
    if failures:
        lines += ["", f"What to do ({len(failures)} of {len(diagnosis.findings)} checks failed):"]
    for failure in failures:
        lines += [f"  {failure.host}, {failure.check}: {failure.message}", f"      -> {failure.remedy}"]
    slower = [finding for finding in diagnosis.findings if finding.ok and finding.remedy]
    if slower:
        lines += ["", "What makes it faster:"]
    for finding in slower:
        lines += [f"  {finding.host}, {finding.check}: {finding.message}", f"      -> {finding.remedy}"]
    return lines


def _state(findings: Sequence[Finding]) -> str:
    if not all(finding.ok for finding in findings):
        return "FAILED"
    return "slower" if any(finding.remedy for finding in findings) else "ok"


def _row(check: str, findings: Sequence[Finding]) -> str:
    if check != "link" and not all(finding.ok for finding in findings):
        return ", ".join(dict.fromkeys(finding.host for finding in findings if not finding.ok))
    if check != "link" and len({finding.message for finding in findings}) == 1:
        return findings[0].message
    return "; ".join(f"{finding.host}: {finding.message}" for finding in findings)


def _place(finding: Finding) -> int:
    return ORDER.index(next(check for check in ORDER if finding.check.startswith(check)))
