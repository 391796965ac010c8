"""From hosts to the one ``mpirun`` line that starts a job on them: no processes, no network."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
import shlex
import socket
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from distclip.openmpi import find_mpirun

# A host that is gone is noticed after about 16 s by ssh and 20 s by Open MPI's own connections; a link that is back
# before that has done no harm.
SSH_OPTIONS = {"BatchMode": "yes", "ConnectTimeout": "5", "ServerAliveInterval": "2", "ServerAliveCountMax": "8"}
KEEPALIVE = {"oob_tcp_keepalive_time": "10", "oob_tcp_keepalive_intvl": "2", "oob_tcp_keepalive_probes": "5"}
FORWARDED = re.compile(r"DISTCLIP_\w+|OMP_NUM_THREADS|MLX_METAL_\w+")  # what every rank should have alike
NOT_FORWARDED = ("DISTCLIP_RANK_PROCESS", "DISTCLIP_TERMINAL")
NAME = re.compile(r"(?:[A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_][\w.-]*", re.ASCII)
INTERFACE = re.compile(r"[A-Za-z0-9][\w.:-]*", re.ASCII)
VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A machine that runs ranks.

    Attributes:
        name: what ssh connects to: a name, an alias of ``~/.ssh/config``, an IPv4 address, with or without ``user@``.
        ips: its addresses on the network that the gradients are to cross; may be empty.
        slots: how many ranks it runs.
    """

    name: str
    ips: tuple[str, ...] = ()
    slots: int = 1


@dataclass(frozen=True)
class Cluster:
    """The hosts in the order of their ranks, and variables (``NAME=VALUE``) that every rank is to have."""

    hosts: tuple[Host, ...]
    env: tuple[str, ...] = ()

    @property
    def slots(self) -> int:
        return sum(host.slots for host in self.hosts)


@dataclass(frozen=True)
class Job:
    """What a run on several hosts shares.

    Attributes:
        cluster: where it runs.
        ranks: how many ranks; the hosts' slots are filled in their order.
        python: the Python of every rank: one path on all hosts.
        mpirun: Open MPI's mpirun, by its full path: Open MPI is in the same place on all hosts.
        cwd: the folder in which every rank runs.
        interface: interfaces or networks (``en5``, ``10.0.0.0/24``) that the bytes take; None lets Open MPI choose.
        env: ``NAME=VALUE`` for every rank, beside those of ``cluster``.
    """

    cluster: Cluster
    ranks: int
    python: str
    mpirun: str
    cwd: str
    interface: str | None = None
    env: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------ reading hosts


def read_hostfile(path: Path) -> Cluster:
    """The hosts of a file: MLX's ``hosts.json`` (from ``mlx.distributed_config``), or an Open MPI hostfile.

    Raises:
        ValueError: the file is missing, is neither, or names a host that is no host name; says where.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the hosts file {path} cannot be read ({error})") from None
    try:
        return _from_json(text) if text.lstrip()[:1] in ("[", "{") else _from_lines(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_hosts(text: str) -> Cluster:
    """The hosts of ``"a,b:2,user@c"``: comma-separated, with the number of ranks behind a colon."""
    hosts = []
    for one in text.split(","):
        name, colon, slots = one.strip().partition(":")
        if colon and not slots.isdecimal():
            raise ValueError(f"{one.strip()!r} in --hosts: a number of ranks goes behind the colon, as in {name}:2")
        hosts.append(_host(name, (), int(slots or 1)))
    return _cluster(hosts)


def _from_json(text: str) -> Cluster:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error})") from None
    listed = found.get("hosts") if isinstance(found, dict) else found
    env = found.get("envs", []) if isinstance(found, dict) else []
    if not isinstance(listed, list) or not all(
        isinstance(one, dict) and isinstance(one.get("ssh"), str) for one in listed
    ):
        raise ValueError('MLX\'s form is a list of hosts such as {"ssh": "mac1", "ips": ["10.0.0.1"]}')
    if not isinstance(env, list):
        raise ValueError(f'"envs" is a list of NAME=VALUE, not {env!r}')
    for one in env:
        _check_variable(one)
    for one in listed:
        for ip in one.get("ips") or []:
            _address(ip)
    return _cluster([_host(one["ssh"], tuple(one.get("ips") or ()), 1) for one in listed], tuple(env))


def _from_lines(text: str) -> Cluster:
    hosts = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        given = dict(word.partition("=")[::2] for word in words[1:])
        slots = given.get("slots", "1")  # Open MPI would count cores instead, and fill the first host
        if not slots.isdecimal():
            raise ValueError(f"line {number}: slots={slots} is no number of ranks")
        hosts.append(_host(words[0], (), int(slots)))
    return _cluster(hosts)


def _cluster(hosts: list[Host], env: tuple[str, ...] = ()) -> Cluster:
    if not hosts:
        raise ValueError("no host is named")
    slots = Counter[str]()
    for host in hosts:  # a host that is named twice runs two ranks
        slots[host.name] += host.slots
    first = {host.name: host for host in reversed(hosts)}
    return Cluster(tuple(replace(first[name], slots=slots[name]) for name in slots), env)


def _host(name: str, ips: tuple[str, ...], slots: int) -> Host:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no host: a name, an IPv4 address or user@name is; give another one an alias in ~/.ssh/config"
        )
    if slots < 1:
        raise ValueError(f"host {name} has {slots} ranks: at least 1, or leave it out")
    if not ips:
        try:
            ips = (str(ipaddress.ip_address(name.rpartition("@")[2])),)
        except ValueError:
            ips = ()
    return Host(name, ips, slots)


def _address(ip: object) -> ipaddress.IPv4Address:
    try:
        return ipaddress.IPv4Address(str(ip))
    except ValueError:
        raise ValueError(f"{ip!r} in ips is no IPv4 address") from None


def _check_variable(text: object) -> None:
    if not isinstance(text, str) or not VARIABLE.fullmatch(text.partition("=")[0]) or "=" not in text or "\0" in text:
        raise ValueError(f"{text!r} is no NAME=VALUE for the environment")


def network(cluster: Cluster) -> str | None:
    """The smallest network (CIDR) that has every address of the hosts; None for one host, and where a host has none.

    Raises:
        ValueError: the addresses have too little in common to be of one network.
    """
    if len(cluster.hosts) == 1 or not all(host.ips for host in cluster.hosts):
        return None
    numbers = [int(_address(ip)) for host in cluster.hosts for ip in host.ips]
    common = 32 - (min(numbers) ^ max(numbers)).bit_length()
    if common < 8:
        listed = ", ".join(ip for host in cluster.hosts for ip in host.ips)
        raise ValueError(f"the hosts' ips ({listed}) are of no common network: name the way with --interface")
    return str(ipaddress.ip_network((min(numbers), common), strict=False))


def ranks_by_host(job: Job) -> dict[str, set[int]]:
    """The ranks that each host runs, by the host's name: slots are filled in the order of the hosts."""
    ranks, first = {}, 0
    for host in job.cluster.hosts:
        last = min(first + host.slots, job.ranks)
        ranks[host.name], first = set(range(first, last)), last
    return ranks


# ------------------------------------------------------------------------------------------------- the options


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which every command that reaches other hosts is told about them."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=Path, metavar="FILE", help="MLX's hosts.json, or an Open MPI hostfile")
    where.add_argument(
        "--hosts", metavar="A,B:2,...", help="hosts, with the number of ranks behind a colon (default 1)"
    )
    parser.add_argument("-n", type=int, metavar="N", help="number of ranks (default: as many as the hosts have slots)")
    parser.add_argument(
        "--interface",
        metavar="NAME|NETWORK",
        help="the way of the bytes, such as en5 or 10.0.0.0/24 (default: the ips)",
    )
    parser.add_argument("--python", metavar="PATH", help="Python on every host (default: this one)")
    parser.add_argument("--mpirun", metavar="PATH", help="Open MPI's mpirun (default: this environment's)")
    parser.add_argument("--cwd", metavar="DIR", help="folder in which every rank runs (default: this one)")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="a variable for every rank; may be repeated"
    )


def cluster_of(args: argparse.Namespace) -> Cluster:
    """The hosts that the options name.

    Raises:
        ValueError: they name none, or not rightly.
    """
    if args.hostfile is not None:
        return read_hostfile(args.hostfile)
    if args.hosts is not None:
        return parse_hosts(args.hosts)
    raise ValueError("name the hosts: --hostfile hosts.json or --hosts a,b")


def job_of(args: argparse.Namespace) -> Job:
    """The job that the options describe.

    Raises:
        ValueError: an option that cannot be right, with the remedy.
    """
    cluster = cluster_of(args)
    ranks = cluster.slots if args.n is None else args.n
    if not 1 <= ranks <= cluster.slots:
        raise ValueError(f"-n {ranks}: the hosts have {cluster.slots} slots; --hosts a:2,b:2 gives them more")
    interface = args.interface or network(cluster)
    for one in interface.split(",") if interface is not None else []:
        if not (_is_network(one) if "/" in one else INTERFACE.fullmatch(one)):
            raise ValueError(f"--interface {one!r} is neither an interface (en5) nor a network (10.0.0.0/24)")
    env = tuple(_variable(text) for text in args.env)
    python, mpirun, cwd = args.python or sys.executable, args.mpirun or find_mpirun(), args.cwd or os.getcwd()
    for option, path in (("--python", python), ("--mpirun", mpirun), ("--cwd", cwd)):
        if not os.path.isabs(path):
            raise ValueError(f"{option} {path}: give the full path, which is the same on every host")
    return Job(cluster, ranks, python, mpirun, cwd, interface, env)


def _variable(text: str) -> str:
    if "=" not in text:
        if text not in os.environ:
            raise ValueError(f"--env {text}: it is not set here; --env {text}=VALUE sets it")
        text = f"{text}={os.environ[text]}"
    _check_variable(text)
    return text


def _is_network(text: str) -> bool:
    try:
        ipaddress.IPv4Network(text, strict=False)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------- the lines


def mpirun_line(job: Job, command: list[str]) -> list[str]:
    """The words of the mpirun line that runs a command, once for each rank.

    Args:
        job: where and how.
        command: what every rank runs, word by word; no shell sees it.
    """
    hosts = job.cluster.hosts
    prefix = str(Path(job.mpirun).parent.parent)
    line = [job.mpirun]
    if prefix not in ("/usr", "/"):  # the system's Open MPI finds its own parts
        line += ["--prefix", prefix]
    if os.getuid() == 0:
        line += ["--allow-run-as-root"]
    line += ["--host", ",".join(f"{host.name}:{host.slots}" for host in hosts), "-n", str(job.ranks)]
    line += ["--map-by", "slot", "--bind-to", "none", "--wdir", job.cwd, "--output", "rank"]
    if job.interface is not None:
        line += ["--mca", "btl_tcp_if_include", job.interface]
        if any(is_here(host) for host in hosts):  # a launcher that runs no rank need not be on that network
            line += ["--prtemca", "prte_if_include", job.interface]
    for name, value in KEEPALIVE.items():
        line += ["--prtemca", name, value]
    line += ["--prtemca", "plm_ssh_args", " ".join(f"-o {name}={value}" for name, value in SSH_OPTIONS.items())]
    line += shlex.split(os.environ.get("MPIRUN_ARGS", ""))
    for name, value in variables(job).items():
        line += ["-x", f"{name}={value}"]
    return [*line, *command]


def variables(job: Job) -> dict[str, str]:
    """What every rank has in its environment beside what its host gives it."""
    here = {
        name: value for name, value in os.environ.items() if FORWARDED.fullmatch(name) and name not in NOT_FORWARDED
    }
    return here | dict(text.split("=", 1) for text in (*job.cluster.env, *job.env))


def ssh_line(host: Host, command: list[str]) -> list[str]:
    """The words of an ssh line that runs a command on a host, asks for nothing, and gives up a dead connection."""
    options = [word for name, value in SSH_OPTIONS.items() for word in ("-o", f"{name}={value}")]
    return ["ssh", *options, "--", host.name, shlex.join(command)]


def is_here(host: Host) -> bool:
    """Whether a host is this machine: an address that a socket can have is one of its own."""
    try:
        addresses = host.ips or tuple(socket.gethostbyname_ex(host.name.rpartition("@")[2])[2])
    except OSError:  # an alias of ~/.ssh/config, perhaps
        return False
    for address in addresses:
        with socket.socket() as one:
            try:
                one.bind((address, 0))
                return True
            except OSError:
                continue
    return False
