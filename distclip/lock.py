"""A lock file: two programs never write the same files, and the one that is refused learns who writes them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

DYING_S = 5.0  # a process that was killed may take so long to die
_BYTES = 512  # of the file: with one size, one write replaces what another process wrote
_HELD_BY_ANOTHER = (errno.EAGAIN, errno.EACCES)
_descriptors: dict[str, int] = {}  # of this process: closing a second one of the same file would release the lock


class Lock:
    """A lock file, which a process holds until it releases it or ends, by ``kill -9`` too.

    The lock is a record lock (``lockf``): the kernel releases it, on a shared disk the server. Forked children do not
    inherit it. A process loses it by closing any descriptor of the file, so nothing else should open the file; ``take``
    takes it again. A file that is left behind by a kill is taken over.

    Args:
        path: the file, in a folder that exists.
        **facts: written into the file beside host, pid and start, as JSON values.

    Attributes:
        problem (str): why the disk cannot lock, as where a server offers no locks; then every process gets the lock.
    """

    def __init__(self, path: Path, **facts: Any):
        self.path, self.problem, self._key = path, "", os.path.realpath(path)
        started = datetime.now(timezone.utc).isoformat(sep=" ", timespec="seconds")
        self.facts = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, **facts}

    def take(self) -> bool:
        """Whether this process has the lock now. It does not wait."""
        try:
            while True:
                descriptor = self._open()
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_at_its_path(descriptor):  # else its owner has removed it in the meantime
                    break
        except OSError as error:
            if error.errno in _HELD_BY_ANOTHER and self._key in _descriptors:
                self._close()
                return False
            self.problem = str(error)
        if self._key in _descriptors:
            with contextlib.suppress(OSError):
                os.pwrite(_descriptors[self._key], json.dumps(self.facts).ljust(_BYTES).encode(), 0)
                os.fsync(_descriptors[self._key])
        return True

    def take_within(self, seconds: float) -> bool:
        """Whether this process has the lock after so many seconds at most."""
        deadline = time.monotonic() + seconds
        while not (taken := self.take()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return taken

    def owner(self) -> dict[str, Any]:
        """The facts of the process that took the lock last; empty where it has not written them."""
        with contextlib.suppress(OSError, ValueError):
            held = _descriptors.get(self._key)
            text = self.path.read_bytes() if held is None else os.pread(held, _BYTES, 0)
            owner = json.loads(text)
            return owner if isinstance(owner, dict) else {}
        return {}

    def release(self) -> None:
        """Remove the file and release the lock, if this process has it."""
        descriptor = _descriptors.get(self._key)
        if descriptor is not None and self.facts["pid"] == os.getpid():
            with contextlib.suppress(OSError):
                if self._is_at_its_path(descriptor):
                    self.path.unlink()
            self._close()

    def _open(self) -> int:
        if self._key in _descriptors and not self._is_at_its_path(_descriptors[self._key]):
            self._close()
        if self._key not in _descriptors:
            _descriptors[self._key] = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return _descriptors[self._key]

    def _close(self) -> None:
        os.close(_descriptors.pop(self._key))

    def _is_at_its_path(self, descriptor: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        return False


def describe(owner: dict[str, Any]) -> str:
    """
    >>> describe({"host": "mac1", "pid": 12, "started": "2026-01-31 12:00:00+00:00"})
    'process 12 on mac1, started 2026-01-31 12:00:00+00:00'
    >>> describe({})
    'another process'
    """
    if not {"host", "pid", "started"} <= owner.keys():
        return "another process"
    return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
