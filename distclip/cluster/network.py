"""Networks, connections, routes, names and links of the hosts, as findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from distclip.cluster import remedies
from distclip.cluster.checks import Facts, Finding, machines
from distclip.cluster.hosts import Host, Job

SLOW = 5  # a link is slow when another link is this many times faster
USED = 0.1  # an interface is used when it carries this share of a host's bytes


def addresses(job: Job, start: Facts, end: Facts) -> list[list[Any]]:
    """Where one host may connect to another, best first: address, port, and the word that the agent there sends."""
    nets = [ip_interface(f"{ip}/{length}").network for _, ip, length in start["networks"]]
    selected = [ip for name, ip, _ in end["networks"] if _selected(job, name, ip)]
    ips = selected or [ip for _, ip, _ in end["networks"]]  # of a launching machine that runs no rank
    ips.sort(key=lambda ip: (ip not in end["met"], not any(ip_address(ip) in net for net in nets)))
    return [[ip, *end["listening"]] for ip in ips[:4]]


def _selected(job: Job, name: str, ip: str) -> bool:
    """Whether the run may use an address of an interface."""
    if job.interface is None:
        return True
    return any(
        ip_address(ip) in ip_network(part, strict=False) if "/" in part else part == name
        for part in job.interface.split(",")
    )


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
    """Check that every host is on the network, and that all connect to each other over it.

    Args:
        job: the run.
        facts: the facts of each host that answered.
        here: the facts of the launching machine.
        connected: from each host, to each other one: the addresses of a connection (``to``, ``by``), or the ``error``.
    """
    off = set()
    for host in job.cluster.hosts:
        if host.name in facts:
            finding = _on_network(job, host, facts)
            if not finding.ok:
                off.add(host.name)
            yield finding
    for name, theirs in machines(facts, here).items():
        if name not in off:
            errors = {
                start: ends[name]["error"]
                for start, ends in connected.items()
                if start not in off and "error" in ends.get(name, {})
            }
            yield _connections(name, theirs, errors, _common(facts))
    for name in facts:
        if name not in off:
            ends = {end: connection for end, connection in connected.get(name, {}).items() if end in facts}
            yield from _routes(job, name, facts[name], ends)


def _on_network(job: Job, host: Host, facts: Mapping[str, Facts]) -> Finding:
    entries = facts[host.name]["networks"]
    own = ", ".join(f"{ip} ({name})" for name, ip, _ in entries) or "no IPv4 address"
    instead = f"select a network that all hosts share: --interface {_common(facts) or '10.0.0.0/24'}"
    strange = [ip for ip in host.ips if ip not in [entry[1] for entry in entries]]
    if strange:
        message = f"{', '.join(strange)} is not its address: {own}"
        return Finding(host.name, "network", False, message, f"correct the ips of {host.name} in the hosts file")
    selected = [f"{ip} ({name})" for name, ip, _ in entries if _selected(job, name, ip)]
    if job.interface is not None and not selected:
        remedy = f"on {host.name}: give it an address there; or {instead}"
        return Finding(host.name, "network", False, f"no address in {job.interface}: {own}", remedy)
    if job.interface is None:
        for _, ip, _ in entries:
            others = [name for name, theirs in facts.items() if ip in [entry[1] for entry in theirs["networks"]]]
            others.remove(host.name)
            if others:
                message = f"{ip} is an address of {', '.join(others)} too, and Open MPI mistakes one for the other"
                return Finding(host.name, "network", False, message, instead)
    return Finding(host.name, "network", True, ", ".join(selected))


def _connections(host: str, facts: Facts, errors: Mapping[str, str], network: str | None) -> Finding:
    if not errors:
        return Finding(host, "connections", True, "every other host connects to it, on a high port")
    message = f"{', '.join(errors)} cannot connect to it: {next(iter(errors.values()))}"
    remedy = f"on {host}: {remedies.open_ports(facts, network or 'ADDRESS')}"
    return Finding(host, "connections", False, message, remedy)


def _routes(job: Job, host: str, facts: Facts, ends: Mapping[str, Facts]) -> Iterator[Finding]:
    names = {ip: name for name, ip, _ in facts["networks"]}
    ips = {end: connection["by"] for end, connection in ends.items() if "by" in connection}
    by = {end: (names.get(ip, "?"), ip) for end, ip in ips.items()}
    wrong = {end: route for end, route in by.items() if route[0] != "?" and not _selected(job, *route)}
    if wrong:
        end, (name, ip) = next(iter(wrong.items()))
        message = f"to {', '.join(wrong)} by {name} ({ip}), which is not in {job.interface}"
        show = f"route -n get {ends[end]['to']}" if facts["system"] == "Darwin" else f"ip route get {ends[end]['to']}"
        yield Finding(host, "route", False, message, f"on {host}: correct the route that `{show}` shows")
    elif by:
        yield Finding(host, "route", True, f"by {', '.join(sorted({name for name, _ in by.values()}))}")


def check_names(job: Job, facts: Mapping[str, Facts], here: Facts) -> Iterator[Finding]:
    """Check that every host resolves the name of every host. Leaves out aliases, which ssh alone resolves."""
    names = {host.name: host.name.rpartition("@")[2] for host in job.cluster.hosts if host.name in facts}
    names = {host: name for host, name in names.items() if isinstance(here["names"].get(name), list)}
    for host, theirs in facts.items():
        errors = {
            end: f"{name} {error}"
            for end, name in names.items()
            if (error := _name_error(theirs["names"][name], facts[end], is_own=end == host))
        }
        if errors:
            lines = [f"{_address(facts[end])} {names[end]}" for end in errors]
            remedy = f"on {host}: in /etc/hosts, have the line{'s' if len(lines) > 1 else ''} {'; '.join(lines)}"
            yield Finding(host, "names", False, ", ".join(errors.values()), remedy)
        elif names:
            yield Finding(host, "names", True, f"it resolves {', '.join(names.values())}")


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
    return str(next(iter([*facts["met"], *(ip for _, ip, _ in facts["networks"])]), "ADDRESS"))


def check_links(links: Sequence[Facts]) -> Iterator[Finding]:
    """Compare the bandwidth of the links between hosts."""
    best = max((link["bandwidth_gbit_s"] for link in links), default=0.0)
    for link in links:
        low, high = link["hosts"]
        message = f"{link['latency_us']:.4g} us, {link['bandwidth_gbit_s']:.3g} Gbit/s"
        is_slow = link["bandwidth_gbit_s"] * SLOW < best
        if is_slow:
            message += f", and the best link has {best:.3g}"
        remedy = f"check cable, port and adapter between {low} and {high}, or select a faster network: --interface"
        yield Finding(f"{low} - {high}", "link", not is_slow, message, remedy if is_slow else "")


def check_bytes(
    job: Job, facts: Mapping[str, Facts], before: Mapping[str, Facts], after: Mapping[str, Facts]
) -> Iterator[Finding]:
    """Check which interfaces carried the bytes of a run, from the counts of each host before and after it."""
    for host in (host for host in before if host in after):
        ips: dict[str, list[str]] = {}
        for name, ip, _ in facts[host]["networks"]:  # not the members of a bridge, which count the same bytes again
            ips.setdefault(name, []).append(ip)
        carried = {name: after[host].get(name, 0) - before[host].get(name, 0) for name in ips}
        total = sum(carried.values())
        used = {name: n / total for name, n in carried.items() if total and n > USED * total}
        shares = ", ".join(f"{name} {share:.0%}" for name, share in used.items())
        if any(not any(_selected(job, name, ip) for ip in ips[name]) for name in used):
            remedy = (
                "something overrides --interface: see the routes there, and here: echo $MPIRUN_ARGS; env | grep OMPI_"
            )
            yield Finding(host, "bytes", False, f"by {shares}, but {job.interface} was selected", remedy)
        elif job.interface is None and len(used) > 1:
            remedy = f"select one: --interface {_common(facts) or 'NETWORK'} (or both: {','.join(used)})"
            yield Finding(host, "bytes", False, f"spread over {shares}; the slower one sets the pace", remedy)
        else:
            yield Finding(host, "bytes", True, f"by {', '.join(used) or 'no interface that counts'}")
