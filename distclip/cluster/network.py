"""Networks, connections, routes, names and links of the hosts, as findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from distclip.cluster import remedies
from distclip.cluster.checks import Facts, Finding, failed, machines, passed
from distclip.cluster.hosts import Host, Job

SLOW = 5  # a link is slow when another link is this many times faster
USED = 0.1  # an interface is used when it carries this share of a host's bytes


def requests(job: Job, facts: Mapping[str, Facts]) -> dict[str, Facts]:
    """The request to each host: connect to each other one."""
    return {
        start: {"do": "connect", "to": {end: _targets(job, theirs, facts[end]) for end in facts if end != start}}
        for start, theirs in facts.items()
    }


def _targets(job: Job, start: Facts, end: Facts) -> list[list[Any]]:
    """Where one host may connect to another, best first: address, port, and the word that the agent there sends."""
    nets = [ip_interface(f"{ip}/{length}").network for _, ip, length in start["networks"]]
    selected = [ip for name, ip, _ in end["networks"] if _selected(job, name, ip)]
    ips = selected or [ip for _, ip, _ in end["networks"]]  # of a launching machine that runs no rank
    ips.sort(key=lambda ip: (ip not in end["met"], not any(ip_address(ip) in net for net in nets)))
    return [[ip, *end["listening"]] for ip in ips[:4]]


def _selected(job: Job, name: str, ip: str) -> bool:
    """Whether the run may use an address of an interface."""
    parts = (job.interface or "0.0.0.0/0").split(",")
    return any(ip_address(ip) in ip_network(part, strict=False) if "/" in part else part == name for part in parts)


def _common(facts: Mapping[str, Facts]) -> str | None:
    """A network in which every host has an address of its own."""
    nets: dict[str, list[str]] = {}
    for theirs in facts.values():
        for _, ip, length in theirs["networks"]:
            nets.setdefault(str(ip_interface(f"{ip}/{length}").network), []).append(ip)
    return next((net for net, ips in nets.items() if len(set(ips)) == len(ips) == len(facts)), None)


def check_network(
    job: Job, facts: Mapping[str, Facts], here: Facts, connected: Mapping[str, Mapping[str, Facts]]
) -> Iterator[Finding]:
    """Check that every host is on the network, and that all connect to each other over it, from what they answered."""
    findings = [_on_network(job, host, facts) for host in job.cluster.hosts if host.name in facts]
    yield from findings
    off = {finding.host for finding in findings if not finding.ok}
    connected = {start: to for start, to in connected.items() if start not in off}
    for name, theirs in machines(facts, here).items():
        if name not in off:
            errors = {start: to[name]["error"] for start, to in connected.items() if "error" in to.get(name, {})}
            if errors:
                message = f"{', '.join(errors)} cannot connect to it: {next(iter(errors.values()))}"
                remedy = remedies.open_ports(theirs, _common(facts) or "ADDRESS")
                yield failed(name, "connections", message, f"on {name}: {remedy}")
            else:
                yield passed(name, "connections", "every other host connects to it, on a high port")
    for name, to in connected.items():
        if name in facts:
            yield from _routes(job, name, facts[name], {end: to[end] for end in to if end in facts})


def _on_network(job: Job, host: Host, facts: Mapping[str, Facts]) -> Finding:
    entries = facts[host.name]["networks"]
    own = ", ".join(f"{ip} ({name})" for name, ip, _ in entries) or "no IPv4 address"
    instead = f"select a network that all hosts share: --interface {_common(facts) or '10.0.0.0/24'}"
    if strange := [ip for ip in host.ips if ip not in [entry[1] for entry in entries]]:
        message = f"{', '.join(strange)} is not its address: {own}"
        return failed(host.name, "network", message, f"correct the ips of {host.name} in the hosts file")
    selected = [f"{ip} ({name})" for name, ip, _ in entries if _selected(job, name, ip)]
    if job.interface is not None and not selected:
        remedy = f"on {host.name}: give it an address there; or {instead}"
        return failed(host.name, "network", f"no address in {job.interface}: {own}", remedy)
    if job.interface is None:
        rest = {name: [ip for _, ip, _ in facts[name]["networks"]] for name in facts if name != host.name}
        for _, ip, _ in entries:
            if others := [name for name, ips in rest.items() if ip in ips]:
                message = f"{ip} is an address of {', '.join(others)} too, and Open MPI mistakes one for the other"
                return failed(host.name, "network", message, instead)
    return passed(host.name, "network", ", ".join(selected))


def _routes(job: Job, host: str, facts: Facts, ends: Mapping[str, Facts]) -> Iterator[Finding]:
    names = {ip: name for name, ip, _ in facts["networks"]}
    by = {end: (names.get(to["by"], "?"), to["by"]) for end, to in ends.items() if "by" in to}
    wrong = {end: route for end, route in by.items() if route[0] != "?" and not _selected(job, *route)}
    if wrong:
        end, (name, ip) = next(iter(wrong.items()))
        message = f"to {', '.join(wrong)} by {name} ({ip}), which is not in {job.interface}"
        show = f"{'route -n' if facts['system'] == 'Darwin' else 'ip route'} get {ends[end]['to']}"
        yield failed(host, "route", message, f"on {host}: correct the route that `{show}` shows")
    elif by:
        yield passed(host, "route", f"by {', '.join(sorted({name for name, _ in by.values()}))}")


def check_names(job: Job, facts: Mapping[str, Facts], here: Facts) -> Iterator[Finding]:
    """Check that every host resolves the name of every host. Leaves out aliases, which ssh alone resolves."""
    resolved = {name for name, ips in here["names"].items() if isinstance(ips, list)}
    names = {host.name: host.address for host in job.cluster.hosts if host.name in facts and host.address in resolved}
    for host, theirs in facts.items():
        wrong = {end: _name_error(theirs["names"][name], facts[end], is_own=end == host) for end, name in names.items()}
        errors = {end: f"{names[end]} {error}" for end, error in wrong.items() if error is not None}
        if errors:
            lines = [f"{_address(facts[end])} {names[end]}" for end in errors]
            remedy = f"on {host}: in /etc/hosts, have the line{'s' if len(lines) > 1 else ''} {'; '.join(lines)}"
            yield failed(host, "names", ", ".join(errors.values()), remedy)
        elif names:
            yield passed(host, "names", f"it resolves {', '.join(names.values())}")


def _name_error(resolved: list[str] | Facts, end: Facts, *, is_own: bool) -> str | None:
    """What is wrong with the addresses to which a host resolves a name of another host, or its own."""
    if not isinstance(resolved, list):
        return "does not resolve"
    if all(ip_address(ip.partition("%")[0]).is_loopback for ip in resolved):
        return None if is_own else f"is {resolved[0]}"
    if ":" not in resolved[0] and not set(resolved) & {ip for _, ip, _ in end["networks"]}:
        return f"is {resolved[0]}, which is none of its addresses"
    return None


def _address(facts: Facts) -> str:
    """An address by which others reach a host: the one that ssh took, or else its first."""
    return str([*facts["met"], *(ip for _, ip, _ in facts["networks"]), "ADDRESS"][0])


def check_links(links: Sequence[Facts]) -> Iterator[Finding]:
    """Compare the bandwidth of the links between hosts."""
    best = max((link["bandwidth_gbit_s"] for link in links), default=0.0)
    for link in links:
        low, high = link["hosts"]
        message = f"{link['latency_us']:.4g} us, {link['bandwidth_gbit_s']:.3g} Gbit/s"
        if link["bandwidth_gbit_s"] * SLOW >= best:
            yield passed(f"{low} - {high}", "link", message)
        else:
            message += f", and the best link has {best:.3g}"
            remedy = f"check cable, port and adapter between {low} and {high}, or select a faster network: --interface"
            yield failed(f"{low} - {high}", "link", message, remedy)


def check_bytes(
    job: Job, facts: Mapping[str, Facts], before: Mapping[str, Facts], after: Mapping[str, Facts]
) -> Iterator[Finding]:
    """Check which interfaces carried the bytes of a run, from the counts of each host before and after it."""
    for host in (host for host in facts if host in before and host in after):
        entries = facts[host]["networks"]  # without the members of a bridge, which count the same bytes again
        carried = {name: after[host].get(name, 0) - before[host].get(name, 0) for name, _, _ in entries}
        total = sum(carried.values())
        used = {name: n / total for name, n in carried.items() if total and n > USED * total}
        shares = ", ".join(f"{name} {share:.0%}" for name, share in used.items())
        if used.keys() - {name for name, ip, _ in entries if _selected(job, name, ip)}:
            remedy = "see the routes there, and here: echo $MPIRUN_ARGS; env | grep OMPI_"
            message = f"by {shares}, but {job.interface} was selected"
            yield failed(host, "bytes", message, f"something overrides --interface: {remedy}")
        elif job.interface is None and len(used) > 1:
            remedy = f"select one: --interface {_common(facts) or 'NETWORK'} (or both: {','.join(used)})"
            yield failed(host, "bytes", f"spread over {shares}; the slower one sets the pace", remedy)
        else:
            yield passed(host, "bytes", f"by {', '.join(used) or 'no interface that counts'}")
