"""Where records go: a file of JSON lines, and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distclip.records.strict import strict


class File:
    """A file that gets a header, then a line for each record, each handed to the system at once."""

    def __init__(self, path: Path, header: dict[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.name, self.lost = f"the record {path}", 0  # records that the file lacks and does not mention yet
        self._header, self._hosts, self._torn = header, None, _is_torn(path)
        self._file = path.open("ab", buffering=0)

    def begin(self) -> None:
        """Write what must stand before the next record: the header, and how many records are missing."""
        if self._header:
            self._line(self._header)
            self._header = {}
        if self.lost:
            self._line({"kind": "dropped", "steps": self.lost})
            self.lost = 0

    def write(self, record: dict[str, Any]) -> None:
        self.begin()
        hosts = record.get("rank_hosts")  # written when they change
        self._line({name: value for name, value in record.items() if name != "rank_hosts" or hosts != self._hosts})
        self._hosts = hosts

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.begin()
        self._file.close()

    def _line(self, record: dict[str, Any]) -> None:
        text = json.dumps(strict(record), allow_nan=False, default=str, separators=(",", ":")) + "\n"
        rest = memoryview(text.encode() if not self._torn else b"\n" + text.encode())
        while rest:  # a disk that fills takes a part of a line
            try:
                written = self._file.write(rest)
            except OSError:
                if rest.tobytes() == b"\n":  # the record is whole: the next line writes its end
                    return
                raise
            self._torn = written < len(rest)
            rest = rest[written:]


def _is_torn(path: Path) -> bool:
    """Whether the file ends within a line: its writer was killed, or its disk was full."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


class Board:
    """A folder for TensorBoard, which gets every number of a record under its name."""

    def __init__(self, folder: str | os.PathLike[str]):
        try:
            from tensorboard.summary import Writer
        except ImportError as error:
            raise ImportError(
                "Recorder(tensorboard=...) needs the package tensorboard: pip install 'distclip[tensorboard]'"
            ) from error
        self.name, self.lost = f"TensorBoard's folder {os.fspath(folder)}", 0
        self._writer = Writer(os.fspath(folder))

    def begin(self) -> None:
        """Nothing: it has no header."""

    def write(self, record: dict[str, Any]) -> None:
        for name, value in _flat(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name in ("kind", "step", "time", "rank_hosts"):
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from ((f"{prefix}{name}/{i}", float(number)) for i, number in enumerate(value))
        else:
            yield f"{prefix}{name}", float(value)
