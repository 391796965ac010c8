"""What ``distclip doctor`` runs on every host: it looks around there, and answers questions over standard input.

Its source travels through ssh, so a host needs nothing but the chosen Python: this file imports the standard library
alone and works with Python 3.8, so that a host with an old one is told apart from a host that does not answer.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import hashlib
import ipaddress
import json
import os
import platform
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any, TextIO

# What starts it: the first line is a request that carries this source, which answers that one and those that follow.
START = (
    "import json, sys; sys.version_info < (3, 8) and sys.exit('it is Python ' + sys.version.split()[0]); "
    "request = json.loads(sys.stdin.readline()); "
    "exec(request['source'], {'__name__': '__agent__', 'request': request})"
)
MARK = "distclip-agent "  # before every answer: a shell's start-up files may write to standard output too
SELF_TEST_MARK = "distclip-self-test "  # before every line of the self-test
LIFE_S = 900  # an agent that nobody asks any more ends by itself
LOOK_S = 8.0
CONNECT_S = 2.0
WHOLE = 64 * 2**20  # larger files are told apart by their size, their beginning and their end
END = 2**20
ENTRIES = 10_000  # files of a folder that are looked at


def serve(request: dict[str, Any], more: TextIO) -> None:
    """Answer a request and every one that follows, one JSON object a line, until there are no more."""
    print(MARK + json.dumps(answer(request)), flush=True)
    for line in more:
        print(MARK + json.dumps(answer(json.loads(line))), flush=True)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a request asks for: ``look``, ``probe``, ``connect`` or ``count``."""
    signal.alarm(LIFE_S)
    what = request["do"]
    if what == "probe":
        return probe()
    if what == "connect":
        return together({name: connecting(ways) for name, ways in request["to"].items()}, CONNECT_S * 2)
    if what == "count":
        return {"bytes": count()}
    return look(request)


def look(request: dict[str, Any]) -> dict[str, Any]:
    """What this host is, has and knows."""
    tasks: dict[str, Callable[[], Any]] = {
        "mpirun": functools.partial(version_of, request["mpirun"]),
        **{"file " + path: functools.partial(describe, path) for path in request["files"]},
        **{"name " + name: functools.partial(addresses_of, name) for name in request["names"]},
    }
    if request["probe"]:
        tasks["probe"] = functools.partial(ask_probe, request["source"], request["env"])
    found = together(tasks, LOOK_S)
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
        "files": {path: found["file " + path] for path in request["files"]},
        "names": {name: found["name " + name] for name in request["names"]},
        "mpirun": found["mpirun"],
        "probe": found.get("probe"),
    }


def together(tasks: dict[str, Callable[[], Any]], limit_s: float) -> dict[str, Any]:
    """The results of functions that run at once; ``{"error": ...}`` for one that fails or is too slow."""
    done: queue.Queue[tuple[str, Any]] = queue.Queue()

    def call(name: str, task: Callable[[], Any]) -> None:
        try:
            done.put((name, task()))
        except Exception as error:
            done.put((name, {"error": str(error) or type(error).__name__}))

    for name, task in tasks.items():
        threading.Thread(target=call, args=(name, task), daemon=True).start()
    results: dict[str, Any] = {name: {"error": f"no answer within {limit_s:g} s"} for name in tasks}
    deadline = time.monotonic() + limit_s
    for _ in tasks:
        try:
            name, result = done.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        results[name] = result
    return results


# --------------------------------------------------------------------------------------------- what is installed


def ask_probe(source: str, env: dict[str, str]) -> dict[str, Any]:
    """:func:`probe` in a process of its own, which MLX may take with it."""
    ended = subprocess.run(
        [sys.executable, "-c", START],
        input=json.dumps({"do": "probe", "source": source}) + "\n",
        capture_output=True,
        text=True,
        timeout=LOOK_S,
        env={**os.environ, **env},
        cwd="/",
    )
    for line in ended.stdout.splitlines():
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line[len(MARK) :])
            return found
    return {"error": last_line(ended.stderr) or f"Python ended with exit code {ended.returncode}"}


def probe() -> dict[str, Any]:
    """The versions of what a rank needs, the device, the kernel and the Open MPI library; the first error instead."""
    found: dict[str, Any] = {"error": None, "versions": {}}
    for name in ("mlx", "mpi4py", "distclip"):
        try:
            found["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found["versions"][name] = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import mlx.core as mx

            found["device"] = "gpu" if mx.default_device() == mx.gpu else "cpu"
            import distclip.engine.kernels
            from distclip.openmpi import find_libmpi

            found["code"] = digest_of_code(os.path.dirname(distclip.__file__))
            found["library"] = os.environ.get("MLX_MPI_LIBNAME") or find_libmpi()
            found["engine"] = distclip.engine.kernels.engine()
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {last_line(str(error))}"
    found["warning"] = str(caught[0].message) if caught else None
    return found


def digest_of_code(folder: str) -> str:
    """Eight digits that tell one state of the Python files of a package from another."""
    digest = hashlib.sha256()
    for base, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(base, name)
                digest.update(os.path.relpath(path, folder).encode())
                with open(path, "rb") as file:
                    digest.update(file.read())
    return digest.hexdigest()[:8]


def version_of(mpirun: str) -> str:
    """The version of an mpirun: ``"5.0.11"``."""
    ended = subprocess.run([mpirun, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LOOK_S)
    first = ended.stdout.decode(errors="replace").strip().split("\n")[0]
    if ended.returncode != 0 or "Open MPI" not in first:
        raise ValueError(f"{mpirun} is no mpirun of Open MPI: {first}")
    return first.split()[-1]


def describe(path: str) -> dict[str, Any] | None:
    """What tells a file or folder from another of the same path; None where there is none."""
    if os.path.isdir(path):
        return describe_folder(path)
    if not os.path.isfile(path):
        return None
    size = os.path.getsize(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= WHOLE:
            while True:
                part = file.read(END)
                if not part:
                    break
                digest.update(part)
        else:
            digest.update(file.read(END))
            file.seek(-END, os.SEEK_END)
            digest.update(file.read(END))
    return {"folder": False, "bytes": size, "digest": digest.hexdigest()[:16]}


def describe_folder(folder: str) -> dict[str, Any]:
    digest, total, seen = hashlib.sha256(), 0, 0
    for base, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names)[: ENTRIES - seen]:
            path = os.path.join(base, name)
            size = os.path.getsize(path) if os.path.exists(path) else -1  # -1: a link to nothing
            digest.update(f"{os.path.relpath(path, folder)} {size}\n".encode(errors="replace"))
            total, seen = total + max(size, 0), seen + 1
    return {"folder": True, "bytes": total, "digest": digest.hexdigest()[:16]}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()


# -------------------------------------------------------------------------------------------------- the network


class _Interface(ctypes.Structure):
    """``struct ifaddrs``, which is the same on Linux and macOS as far as it is read."""


_Interface._fields_ = [
    ("next", ctypes.POINTER(_Interface)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
]


def networks() -> list[tuple[str, str, int]]:
    """Interface, IPv4 address and length of the prefix of every address but the loopback's."""
    library = ctypes.CDLL(ctypes.util.find_library("c") if sys.platform == "darwin" else None)
    first = ctypes.POINTER(_Interface)()
    if library.getifaddrs(ctypes.byref(first)) != 0:
        return []
    found = []
    entry = first
    while entry:
        one = entry.contents
        if one.flags & 1 and one.address and one.netmask and _family(one.address) == socket.AF_INET:
            address = ipaddress.IPv4Address(ctypes.string_at(one.address + 4, 4))
            mask = int.from_bytes(ctypes.string_at(one.netmask + 4, 4), "big")
            if not address.is_loopback:
                found.append((one.name.decode(), str(address), bin(mask).count("1")))
        entry = one.next
    library.freeifaddrs(first)
    return found


def _family(address: int) -> int:
    head = ctypes.string_at(address, 2)
    return head[1] if sys.platform == "darwin" else int.from_bytes(head, sys.byteorder)


def addresses_of(name: str) -> list[str]:
    """What a name resolves to here: its IPv4 addresses, or else what other ones it has."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    fours = [str(one[4][0]) for one in found if one[0] == socket.AF_INET]
    return sorted(set(fours or [str(one[4][0]) for one in found]))


def listen() -> list[Any]:
    """Listen on a free port, as every rank of Open MPI does; whoever connects is told a word that no other host has."""
    word = os.urandom(8).hex()
    server = socket.socket()
    server.bind(("", 0))
    server.listen(128)

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
                connection.sendall(word.encode())
                connection.close()
            except OSError:
                continue

    threading.Thread(target=accept, daemon=True).start()
    return [server.getsockname()[1], word]


def connecting(ways: list[list[Any]]) -> Callable[[], dict[str, Any]]:
    """A function that tries ways to a host (address, port, its word), and says by which address of this host it went.

    The first way that leads there counts, or else what is wrong with the first.
    """

    def connect() -> dict[str, Any]:
        wrong = ""
        for address, port, word in ways:
            try:
                with socket.create_connection((address, port), timeout=CONNECT_S / len(ways)) as connection:
                    if connection.recv(64).decode(errors="replace") == word:
                        return {"to": address, "by": connection.getsockname()[0]}
                wrong = wrong or f"another host answers at {address}"
            except OSError as error:
                wrong = wrong or f"{address}:{port}: {error.strerror or error}"
        return {"error": wrong or "it has no address"}

    return connect


def count() -> dict[str, int]:
    """How many bytes each interface has carried, in and out."""
    if sys.platform == "darwin":
        listing = subprocess.run(["netstat", "-ibn"], stdout=subprocess.PIPE, timeout=5).stdout.decode()
        return count_of(listing)
    with open("/proc/net/dev") as file:
        rows = [line.replace(":", " ").split() for line in file.readlines()[2:]]
    return {row[0]: int(row[1]) + int(row[9]) for row in rows}


def count_of(listing: str) -> dict[str, int]:
    """The bytes in what macOS's ``netstat -ibn`` lists; an interface without a hardware address has a column less."""
    rows = [line.split() for line in listing.splitlines() if "<Link#" in line]
    return {row[0].rstrip("*"): int(row[-5]) + int(row[-2]) for row in rows}


if __name__ == "__agent__":  # START has read the first request
    serve(globals()["request"], sys.stdin)
