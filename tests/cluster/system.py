"""What a lab needs of the system: commands with a limit, namespaces, and the processes in them."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LIMIT_S = 20  # for each step of a lab's own work, which takes milliseconds


def run(command: Sequence[str], text: str = "") -> None:
    """Run a command that must succeed, with a text as its standard input."""
    ended = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=LIMIT_S, env={"PATH": PATH}, errors="replace"
    )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} {text} ended with {ended.returncode}: {ended.stderr.strip()}")


class Keeper:
    """A process that prints "ready", and runs until its maker closes its standard input."""

    def __init__(self, command: Sequence[str]):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env={"PATH": PATH}
        )
        self.pid = self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self) -> None:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], LIMIT_S)
        if not readable or self._process.stdout.readline() != "ready\n":
            self._process.kill()
            raise RuntimeError(f"a process of the lab did not start: {self._process.communicate()[1].strip()}")

    def wait(self) -> None:
        self._process.wait(LIMIT_S)

    def end(self) -> None:
        """End it; of a host's, all processes of the host are gone when this returns."""
        try:
            self._process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


# ---------------------------------------------------------------------------------------------------- namespaces

NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc")


def in_network(pid: int) -> list[str]:
    """The words that begin a command in the network of a process."""
    return ["nsenter", "--target", str(pid), "--net"]


def in_host(pid: int, folder: Path | str = "/") -> list[str]:
    """The words that begin a command in all namespaces of a process, and in a folder.

    Only the children of the shell are processes of the host: stopping the host does not stop the shell.
    """
    namespaces = ["--uts", "--ipc", "--mount", "--pid", "--no-fork"]
    return [*in_network(pid), *namespaces, "bash", "-c", 'cd "$0" && "$@"; exit $?', str(folder)]


# ----------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """A process of a host, seen from outside."""

    pid: int  # for os.kill
    parent: int
    state: str
    command: str
    host: int  # its number

    def __repr__(self) -> str:
        return f"<{self.pid} ({self.state}) on h{self.host}: {self.command[:80]}>"


def processes(hosts: Mapping[int, int]) -> list[Process]:
    """The processes of hosts, given as number and first process."""
    numbers = {_namespace(init): number for number, init in hosts.items()}
    numbers.pop(None, None)  # of hosts that are gone
    running = []
    for pid, parent, state in _table():
        number = numbers.get(_namespace(pid))
        if number is not None and state not in "ZX":
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                running.append(Process(pid, parent, state, words.replace("\0", " ").strip(), number))
    return running


def child_of(pid: int) -> int:
    return next(child for child, parent, _ in _table() if parent == pid)


def pid_inside(pid: int) -> str | None:
    """A process's number as its host sees it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return line.split()[-1]
    return None


def _table() -> Iterator[tuple[int, int, str]]:
    """Every process: its number, its parent's, and its state."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            yield int(folder.name), int(parent), state


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def send(number: int, pid: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# ---------------------------------------------------------------------------------------------------- and the rest


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + LIMIT_S
    while not is_so():
        if time.monotonic() > until:
            raise RuntimeError(f"the lab waited {LIMIT_S} s for {what}")
        time.sleep(0.005)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
