"""Hosts files and options: which hosts run a job, with what. Starts no processes, uses no network."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from distclip.openmpi import find_mpirun

NAME = re.compile(r"(?:[A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_][\w.-]*", re.ASCII)
COUNT = re.compile("[0-9]{1,6}")
INTERFACE = re.compile(r"[A-Za-z0-9][\w.:-]*", re.ASCII)
VARIABLE = re.compile(r"[A-Za-z_]\w*=[^\0]*", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A machine that runs ranks."""

    name: str  # for ssh: a name, an alias of ~/.ssh/config, an IPv4 address, with or without user@
    ips: tuple[str, ...] = ()  # its addresses on the network of the gradients
    slots: int = 1  # how many ranks it runs

    @property
    def address(self) -> str:
        """The name without ``user@``."""
        return self.name.rpartition("@")[2]


@dataclass(frozen=True)
class Cluster:
    """The hosts in the order of their ranks, and the variables (``NAME=VALUE``) of every rank."""

    hosts: tuple[Host, ...]
    env: tuple[str, ...] = ()

    @property
    def slots(self) -> int:
        return sum(host.slots for host in self.hosts)


@dataclass(frozen=True)
class Job:
    """A run on several hosts. Its paths are full paths, the same on all hosts."""

    cluster: Cluster
    ranks: int  # they fill the hosts' slots in order
    python: str
    mpirun: str
    cwd: str  # the folder in which every rank runs
    interface: str | None = None  # interfaces or networks (en5, 10.0.0.0/24) of the gradients; None: Open MPI chooses
    env: tuple[str, ...] = ()  # NAME=VALUE for every rank, in addition to those of the cluster


def read_hostfile(path: Path) -> Cluster:
    """Read MLX's ``hosts.json`` (from ``mlx.distributed_config``), or an Open MPI hostfile.

    Raises:
        ValueError: the file is missing, has another form, or has a bad host name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the hosts file {path} cannot be read ({error})") from None
    try:
        return _from_json(text) if text.lstrip()[:1] in ("[", "{") else _from_lines(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_hosts(text: str) -> Cluster:
    """Parse ``"a,b:2,user@c"``: hosts, each with its number of ranks after a colon."""
    hosts = []
    for word in text.split(","):
        name, colon, slots = word.strip().partition(":")
        if colon and not COUNT.fullmatch(slots):
            raise ValueError(f"{word.strip()!r} in --hosts: the number of ranks follows the colon, as in {name}:2")
        hosts.append(_host(name, int(slots or 1)))
    return _cluster(hosts)


def _from_json(text: str) -> Cluster:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply for a hosts file") from None
    content = content if isinstance(content, dict) else {"hosts": content}
    entries, env = content.get("hosts"), content.get("envs", [])
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("ssh"), str) for e in entries):
        raise ValueError('MLX\'s form is a list of hosts such as {"ssh": "mac1", "ips": ["10.0.0.1"]}')
    if not isinstance(env, list):
        raise ValueError(f'"envs" is a list of NAME=VALUE, not {env!r}')
    for entry in entries:
        ips = entry.get("ips")
        if ips is not None and not (isinstance(ips, list) and all(isinstance(ip, str) for ip in ips)):
            raise ValueError(f'"ips" of {entry["ssh"]} is a list of addresses such as ["10.0.0.1"], not {ips!r}')
    hosts = [_host(entry["ssh"], 1, tuple(entry.get("ips") or ())) for entry in entries]
    return _cluster(hosts, tuple(map(_check_variable, env)))


def _from_lines(text: str) -> Cluster:
    hosts = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        options = dict(word.partition("=")[::2] for word in words[1:])
        slots = options.get("slots", "1")  # Open MPI would count cores instead, and fill the first host
        if not COUNT.fullmatch(slots):
            raise ValueError(f"line {number}: slots={slots} is not a number of ranks")
        hosts.append(_host(words[0], int(slots)))
    return _cluster(hosts)


def _cluster(hosts: list[Host], env: tuple[str, ...] = ()) -> Cluster:
    if not hosts:
        raise ValueError("it lists no hosts")
    slots = Counter[str]()
    for host in hosts:  # a host that is listed twice runs two ranks
        slots[host.name] += host.slots
    first = {host.name: host for host in reversed(hosts)}
    return Cluster(tuple(replace(first[name], slots=slots[name]) for name in slots), env)


def _host(name: str, slots: int, ips: tuple[str, ...] = ()) -> Host:
    if not NAME.fullmatch(name):
        expected = "give a name, an IPv4 address, user@name or an alias of ~/.ssh/config"
        if re.search(r":\d+$", name):
            expected = "a port belongs in ~/.ssh/config, a number of ranks in slots=N or --hosts"
        raise ValueError(f"{name!r} is not a host: {expected}")
    if slots < 1:
        raise ValueError(f"host {name} has {slots} ranks: give it at least 1, or remove it")
    for ip in ips:
        if not _is_network(f"{ip}/32"):
            raise ValueError(f"{ip!r} in ips is not an IPv4 address")
    host = Host(name, ips, slots)
    return host if ips or not _is_network(host.address) else replace(host, ips=(host.address,))


def _check_variable(text: object) -> str:
    if not isinstance(text, str) or not VARIABLE.fullmatch(text):
        raise ValueError(f"{text!r} is not NAME=VALUE")
    return text


def network(cluster: Cluster) -> str | None:
    """The smallest network (CIDR) with every address of the hosts; None for a single host, or if one has no address."""
    if len(cluster.hosts) == 1 or not all(host.ips for host in cluster.hosts):
        return None
    ips = [ip for host in cluster.hosts for ip in host.ips]
    numbers = [int(ipaddress.IPv4Address(ip)) for ip in ips]
    common = 32 - (min(numbers) ^ max(numbers)).bit_length()
    if common < 8:
        raise ValueError(f"the hosts' ips ({', '.join(ips)}) have no common network: select one with --interface")
    return str(ipaddress.ip_network((min(numbers), common), strict=False))


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the hosts of a job and what it runs with."""
    hosts, add = parser.add_mutually_exclusive_group(), parser.add_argument
    hosts.add_argument("--hostfile", type=Path, metavar="FILE", help="MLX's hosts.json, or an Open MPI hostfile")
    hosts.add_argument("--hosts", metavar="A,B:2,...", help="hosts, each with its number of ranks (default: 1)")
    add("-n", type=int, metavar="N", help="number of ranks (default: as many as the hosts have slots)")
    interface = "interface or network of the gradients, such as en5 or 10.0.0.0/24 (default: that of the ips)"
    add("--interface", metavar="NAME|NETWORK", help=interface)
    add("--python", default=sys.executable, metavar="PATH", help="Python on every host (default: this one)")
    add("--mpirun", metavar="PATH", help="Open MPI's mpirun (default: this environment's)")
    add("--cwd", default=os.getcwd(), metavar="DIR", help="folder in which every rank runs (default: this one)")
    add("--env", action="append", default=[], metavar="NAME[=VALUE]", help="a variable for every rank; may be repeated")


def job_of(args: argparse.Namespace) -> Job:
    """The job that the options describe.

    Raises:
        ValueError: a bad option, with the remedy.
    """
    if args.hostfile is None and args.hosts is None:
        raise ValueError("name the hosts: --hostfile hosts.json or --hosts a,b")
    cluster = parse_hosts(args.hosts) if args.hostfile is None else read_hostfile(args.hostfile)
    ranks = cluster.slots if args.n is None else args.n
    if not 1 <= ranks <= cluster.slots:
        raise ValueError(f"-n {ranks}: the hosts have {cluster.slots} slots; --hosts a:2,b:2 gives them more")
    interface = args.interface or network(cluster)
    for part in interface.split(",") if interface is not None else []:
        if not (INTERFACE.fullmatch(part) or _is_network(part)):
            raise ValueError(f"--interface {part!r} is neither an interface (en5) nor a network (10.0.0.0/24)")
    env = tuple(_variable(text) for text in args.env)
    mpirun = args.mpirun or find_mpirun()
    for option, path in (("--python", args.python), ("--mpirun", mpirun), ("--cwd", args.cwd)):
        if not os.path.isabs(path):
            raise ValueError(f"{option} {path}: give the full path; it must be the same on every host")
    return Job(cluster, ranks, args.python, mpirun, args.cwd, interface, env)


def _variable(text: str) -> str:
    if "=" not in text and text not in os.environ:
        raise ValueError(f"--env {text}: it is not set here; --env {text}=VALUE sets it")
    return _check_variable(text if "=" in text else f"{text}={os.environ[text]}")


def _is_network(text: str) -> bool:
    """Whether a text is an IPv4 address, or a network such as ``10.0.0.0/24``."""
    try:
        ipaddress.IPv4Network(text, strict=False)
    except ValueError:
        return False
    return True
