"""The mpirun line of a job, the ssh line of a host, and the environment of every rank. Starts no processes."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
from pathlib import Path

from distclip.cluster.hosts import Host, Job

# ssh notices after about 16 s that a host is gone, Open MPI's own connections after 20 s. A link that comes back sooner
# does no harm.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=5 -o ServerAliveInterval=2 -o ServerAliveCountMax=8"
KEEPALIVE = {"oob_tcp_keepalive_time": "10", "oob_tcp_keepalive_intvl": "2", "oob_tcp_keepalive_probes": "5"}
# Variables that every rank gets from here; the two that are left out are about one process.
FORWARDED = re.compile(r"DISTCLIP_(?!(RANK_PROCESS|TERMINAL)$)\w+|OMP_NUM_THREADS|MLX_METAL_\w+")
AS_ROOT = ["--allow-run-as-root"] if os.getuid() == 0 else []


def mpirun_line(job: Job, command: list[str]) -> list[str]:
    """The words of the mpirun line that runs the words of a command, once for each rank. No shell reads them."""
    hosts = job.cluster.hosts
    prefix = str(Path(job.mpirun).parent.parent)
    line = [job.mpirun]
    if prefix not in ("/usr", "/"):  # the system's Open MPI finds its own files
        line += ["--prefix", prefix]
    line += [*AS_ROOT, "--host", ",".join(f"{host.name}:{host.slots}" for host in hosts), "-n", str(job.ranks)]
    line += ["--map-by", "slot", "--bind-to", "none", "--wdir", job.cwd, "--output", "rank:raw"]
    if job.interface is not None:
        line += ["--mca", "btl_tcp_if_include", job.interface]
        if any(is_here(host) for host in hosts):  # a launcher that runs no rank need not be on that network
            line += ["--prtemca", "prte_if_include", job.interface]
    for name, value in KEEPALIVE.items():
        line += ["--prtemca", name, value]
    line += ["--prtemca", "plm_ssh_args", SSH_OPTIONS]
    line += shlex.split(os.environ.get("MPIRUN_ARGS", ""))
    for name, value in variables(job).items():
        line += ["-x", f"{name}={value}"]
    return [*line, *command]


def variables(job: Job) -> dict[str, str]:
    """The variables that the launcher sets for every rank."""
    forwarded = {name: value for name, value in os.environ.items() if FORWARDED.fullmatch(name)}
    return forwarded | dict(text.split("=", 1) for text in (*job.cluster.env, *job.env))


def ranks_by_host(job: Job) -> dict[str, set[int]]:
    """The ranks of each host, by the host's name."""
    ranks, first = {}, 0
    for host in job.cluster.hosts:
        last = min(first + host.slots, job.ranks)
        ranks[host.name], first = set(range(first, last)), last
    return ranks


def ssh_line(host: Host, command: list[str]) -> list[str]:
    """The words of an ssh line that runs a command on a host, asks nothing, and gives up a dead connection."""
    return ["ssh", *SSH_OPTIONS.split(), "--", host.name, shlex.join(command)]


def is_here(host: Host) -> bool:
    """Whether a host is this machine: a socket can bind one of its addresses. May wait for a name to resolve."""
    try:
        addresses = host.ips or tuple(socket.gethostbyname_ex(host.address)[2])
    except OSError:  # an alias of ~/.ssh/config, perhaps
        return False
    for address in addresses:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind((address, 0))
            return True
    return False
