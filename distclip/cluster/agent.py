"""What ``distclip doctor`` runs on every host: it reports the host's facts, and answers requests on standard input.

Its source travels through ssh, so a host needs nothing but the selected Python. This file imports the standard library
alone and runs on Python 3.8, so that an old Python is reported as such and not as a host that does not answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import hashlib
import ipaddress
import itertools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

# The program that starts it. The first request carries this source.
START = (
    "import json, sys; sys.version_info < (3, 8) and sys.exit('it is Python ' + sys.version.split()[0]); "
    "request = json.loads(sys.stdin.readline()); "
    "exec(request['source'], {'__name__': '__agent__', 'request': request})"
)
MARK = "distclip-agent "  # begins every answer: a shell's start-up files may print before it, without a newline too
SELF_TEST_MARK = "distclip-self-test "  # begins every line of the self-test
LIFE_S = 900  # an agent ends by itself this long after the last request
LOOK_S = 20.0
PROBE_S = 9.0  # twice that fits LOOK_S. On a Mac the first use compiles kernels, for a time that nobody has measured
CONNECT_S = 2.0
WHOLE_BYTES = 64 * 2**20  # the digest of a larger file is that of its beginning and end
END_BYTES = 2**20
MAX_FILES = 10_000  # of a folder's digest


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request ``look``, ``probe``, ``connect`` or ``count``."""
    signal.alarm(LIFE_S)
    kind = request["do"]
    if kind == "probe":
        return probe()
    if kind == "connect":
        tasks = {name: functools.partial(connect, addresses) for name, addresses in request["to"].items()}
        return run_parallel(tasks, CONNECT_S * 2)
    if kind == "count":
        return count()
    return look(request)


def look(request: dict[str, Any]) -> dict[str, Any]:
    """The facts of this host."""
    tasks: dict[str, Callable[[], Any]] = {
        "mpirun": functools.partial(version_of, request["mpirun"]),
        **{"file " + path: functools.partial(describe, path) for path in request["files"]},
        **{"name " + name: functools.partial(addresses_of, name) for name in request["names"]},
    }
    if request["probe"]:
        tasks["probe"] = functools.partial(probe_in_subprocess, request["source"], request["env"])
    results = run_parallel(tasks, LOOK_S)
    folder = os.path.dirname(request["mpirun"])
    return {
        "hostname": socket.gethostname(),
        "system": platform.system(),
        "python": [platform.python_version(), sys.executable],
        "networks": networks(),
        "met": os.environ.get("SSH_CONNECTION", "").split(" ")[2:3],  # the address to which ssh connected
        "listening": listen(),
        "daemon": any(os.access(os.path.join(folder, name), os.X_OK) for name in ("prted", "orted")),
        "cwd": os.path.isdir(request["cwd"]),
        "files": {path: results["file " + path] for path in request["files"]},
        "names": {name: results["name " + name] for name in request["names"]},
        "mpirun": results["mpirun"],
        "probe": results.get("probe"),
    }


def run_parallel(tasks: Mapping[str, Callable[[], Any]], timeout_s: float) -> dict[str, Any]:
    """The results of functions, each in a thread; ``{"error": ...}`` for a function that fails or times out."""
    results: dict[str, Any] = {name: {"error": f"no answer within {timeout_s:g} s"} for name in tasks}

    def call(name: str, task: Callable[[], Any]) -> None:
        try:
            results[name] = task()
        except Exception as error:
            results[name] = {"error": str(error) or type(error).__name__}

    threads = [threading.Thread(target=call, args=item, daemon=True) for item in tasks.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(results)  # a late thread does not change the copy


def probe_in_subprocess(source: str, env: dict[str, str]) -> dict[str, Any]:
    """Run :func:`probe` in a process of its own, since MLX may crash; again by MLX operations if a signal ended it."""
    report = _run_probe(source, {**os.environ, **env})
    if report.get("signal"):
        by_operations = _run_probe(source, {**os.environ, **env, "DISTCLIP_ENGINE": "mlx"})
        if "engine" in by_operations:
            return {**by_operations, "signal": report["signal"]}
    return report


def _run_probe(source: str, env: dict[str, str]) -> dict[str, Any]:
    command, text = [sys.executable, "-c", START], json.dumps({"do": "probe", "source": source})
    ended = subprocess.run(command, input=text, capture_output=True, text=True, timeout=PROBE_S, env=env, cwd="/")
    for line in ended.stdout.splitlines():
        if MARK in line:
            report: dict[str, Any] = json.loads(line.partition(MARK)[2])
            return report
    error = last_line(ended.stderr) or f"Python ended with exit code {ended.returncode}"
    return {"error": error, "signal": max(-ended.returncode, 0)}


def probe() -> dict[str, Any]:
    """The versions of packages, the device, the engine and the Open MPI library, as far as the first error."""
    report: dict[str, Any] = {"error": None, "versions": {}}
    for name in ("mlx", "mpi4py", "distclip"):
        try:
            report["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            report["versions"][name] = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import mlx.core as mx

            report["device"] = "gpu" if mx.default_device() == mx.gpu else "cpu"
            import distclip.engine.gpu
            import distclip.engine.kernels
            from distclip.openmpi import find_libmpi
            from distclip.world import fast_synch

            report["code"] = digest_of_code(os.path.dirname(distclip.__file__))
            report["library"] = os.environ.get("MLX_MPI_LIBNAME") or find_libmpi()
            report["wanted"] = os.environ.get("DISTCLIP_ENGINE") or None
            report["cpu"] = distclip.engine.kernels.engine(mx.cpu)  # warns of the native kernel
            report["warning"] = str(caught[0].message) if caught else None
            report["fast_synch"] = fast_synch()
            report["gpu_problem"] = distclip.engine.gpu.problem() if report["device"] == "gpu" else ""
            report["engine"] = distclip.engine.kernels.engine()
        except Exception as error:
            report["error"] = f"{type(error).__name__}: {last_line(str(error))}"
    return report


def digest_of_code(folder: str) -> str:
    """A digest of the Python files of a package: 8 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in files_below(folder):
        if path.endswith(".py"):
            digest.update(os.path.relpath(path, folder).encode())
            with open(path, "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()[:8]


def files_below(folder: str) -> Iterator[str]:
    for base, folders, names in os.walk(folder):
        folders.sort()
        yield from (os.path.join(base, name) for name in sorted(names))


def version_of(mpirun: str) -> str:
    """The version of an mpirun: ``"5.0.11"``."""
    ended = subprocess.run([mpirun, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LOOK_S)
    first = ended.stdout.decode(errors="replace").strip().split("\n")[0]
    if ended.returncode != 0 or "Open MPI" not in first:
        raise ValueError(f"{mpirun} is no mpirun of Open MPI: {first}")
    return first.split()[-1]


def describe(path: str) -> dict[str, Any] | None:
    """Size and digest of a file or folder; None if there is none."""
    if os.path.isdir(path):
        return describe_folder(path)
    if not os.path.isfile(path):
        return None
    size = os.path.getsize(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size > WHOLE_BYTES:
            digest.update(file.read(END_BYTES))
            file.seek(-END_BYTES, os.SEEK_END)
        for block in iter(functools.partial(file.read, END_BYTES), b""):
            digest.update(block)
    return {"folder": False, "bytes": size, "digest": digest.hexdigest()[:16]}


def describe_folder(folder: str) -> dict[str, Any]:
    digest, total = hashlib.sha256(), 0
    for path in itertools.islice(files_below(folder), MAX_FILES):
        size = os.path.getsize(path) if os.path.exists(path) else -1  # -1: a broken link
        digest.update(f"{os.path.relpath(path, folder)} {size}\n".encode(errors="replace"))
        total += max(size, 0)
    return {"folder": True, "bytes": total, "digest": digest.hexdigest()[:16]}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()


class _Interface(ctypes.Structure):
    """The first fields of ``struct ifaddrs``, the same on Linux and macOS."""

    _fields_ = [("next", ctypes.c_void_p), ("name", ctypes.c_char_p), ("flags", ctypes.c_uint)]
    _fields_ += [("address", ctypes.c_void_p), ("netmask", ctypes.c_void_p)]


def networks() -> list[tuple[str, str, int]]:
    """Interface, IPv4 address and prefix length of every address, without the loopback."""
    library = ctypes.CDLL(ctypes.util.find_library("c") if sys.platform == "darwin" else None)
    first = ctypes.c_void_p()
    if library.getifaddrs(ctypes.byref(first)) != 0:
        return []
    addresses, pointer = [], first.value
    while pointer:
        entry = _Interface.from_address(pointer)
        if entry.flags & 1 and entry.address and entry.netmask and _family(entry.address) == socket.AF_INET:
            address = ipaddress.IPv4Address(ctypes.string_at(entry.address + 4, 4))
            mask = int.from_bytes(ctypes.string_at(entry.netmask + 4, 4), "big")
            if not address.is_loopback:
                addresses.append((entry.name.decode(), str(address), bin(mask).count("1")))
        pointer = entry.next
    library.freeifaddrs(first)
    return addresses


def _family(address: int) -> int:
    head = ctypes.string_at(address, 2)
    return head[1] if sys.platform == "darwin" else int.from_bytes(head, sys.byteorder)


def addresses_of(name: str) -> list[str]:
    """The addresses of a host name: IPv4 if there are any, else IPv6."""
    answers = [(family, str(where[0])) for family, _, _, _, where in socket.getaddrinfo(name, None)]
    ipv4 = {address for family, address in answers if family == socket.AF_INET}
    return sorted(ipv4 or {address for _, address in answers})


def listen() -> list[Any]:
    """Listen on a free port, as every rank of Open MPI does; returns the port, and a word that the listener sends."""
    word = os.urandom(8).hex()
    server = socket.socket()
    server.bind(("", 0))
    server.listen(128)

    def accept() -> None:
        while True:
            with contextlib.suppress(OSError), server.accept()[0] as connection:
                connection.sendall(word.encode())

    threading.Thread(target=accept, daemon=True).start()
    return [server.getsockname()[1], word]


def connect(addresses: list[list[Any]]) -> dict[str, Any]:
    """Try the addresses (address, port, word) of a host in turn: to which, and from which of this host, it connected.

    If none connects, the error is that of the first.
    """
    errors = []
    for address, port, word in addresses:
        try:
            with socket.create_connection((address, port), timeout=CONNECT_S / len(addresses)) as connection:
                if connection.recv(64).decode(errors="replace") == word:
                    return {"to": address, "by": connection.getsockname()[0]}
            errors.append(f"another host answers at {address}")
        except OSError as error:
            errors.append(f"{address}:{port}: {error.strerror or error}")
    return {"error": (errors or ["it has no address"])[0]}


def count() -> dict[str, int]:
    """The bytes that each interface has received and sent."""
    if sys.platform == "darwin":
        listing = subprocess.run(["netstat", "-ibn"], stdout=subprocess.PIPE, timeout=5).stdout.decode()
        return parse_netstat(listing)
    with open("/proc/net/dev") as file:
        rows = [line.replace(":", " ").split() for line in file.readlines()[2:]]
    return {row[0]: int(row[1]) + int(row[9]) for row in rows}


def parse_netstat(listing: str) -> dict[str, int]:
    """The bytes in the output of macOS's ``netstat -ibn``. An interface without hardware address has a column less."""
    rows = [line.split() for line in listing.splitlines() if "<Link#" in line]
    return {row[0].rstrip("*"): int(row[-5]) + int(row[-2]) for row in rows}


if __name__ == "__agent__":  # the program of START
    for each in itertools.chain([globals()["request"]], map(json.loads, sys.stdin)):
        print(MARK + json.dumps(answer(each)), flush=True)
