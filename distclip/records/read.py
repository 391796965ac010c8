"""Read a record back, cut off or damaged as it may be."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

KIND, FORMAT = "distclip-record", 1
NAMES = {"kind", "norm", "threshold", "scale", "clipped", "finite", "skipped", "groups", "rank_norms", "rank_hosts"}
NAMES |= {"noise_scale", "time", "step_s"}
LONGEST, HOPELESS = 2**24, 100  # bytes in a line; lines at the start without a header
PLAIN = (float, bool)  # numbers that are good as they are
LISTS = ("groups", "rank_norms")  # never a number
_decode = json.JSONDecoder().decode


@dataclass
class Records:
    """The contents of a file.

    Attributes:
        steps (list of dict): in order of ``step``, each once.
        headers (list of dict): one for each start of the run.
        hosts (list of str): of the ranks, where it was recorded.
        dropped (int): how many steps the recorder could not write.
        damaged (list of (int, str)): lines that were left out, and why.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, Any]] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    dropped: int = 0
    damaged: list[tuple[int, str]] = field(default_factory=list)

    def __repr__(self) -> str:
        steps, damaged = len(self.steps), len(self.damaged)
        return f"<Records of {steps} steps, {self.dropped} dropped, {damaged} lines damaged>"


def read_records(path: str | os.PathLike[str]) -> Records:
    """Read what a :class:`Recorder` wrote, cut off or damaged as it may be.

    A resumed run replaces the steps of earlier runs from its first step on.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, or no record, or of a newer distclip.
    """
    records = Records()
    steps = records.steps
    for resumed, step in scan(path, records):
        while resumed and steps and steps[-1]["step"] >= step["step"]:
            steps.pop()
        steps.append(step)
    records.steps = sorted({step["step"]: step for step in steps}.values(), key=lambda step: step["step"])
    return records


def scan(path: str | os.PathLike[str], records: Records) -> Iterator[tuple[bool, dict[str, Any]]]:
    """The steps of a file in its order, each with whether a run was resumed with it; the rest goes to ``records``."""
    empty, resumed = True, False
    for record in _lines(path, records):
        if record.get("kind") == KIND:
            if record["format"] > FORMAT:
                raise ValueError(f"{path} was written by a newer distclip ({record.get('distclip')}): update this one")
            if records.headers and "config" in record and record["config"] == records.headers[-1].get("config"):
                record["config"] = records.headers[-1]["config"]  # once in memory, however often it was started
            records.headers.append(record)
            resumed = True
        elif "kind" in record:
            records.dropped += record["steps"]
        elif not records.headers and not records.damaged:
            raise ValueError(f"{path} is no record of distclip: it does not begin with a header")
        else:
            records.hosts = record.pop("rank_hosts", records.hosts)
            yield resumed, record
            empty, resumed = False, False
    if not records.headers and empty:
        raise ValueError(f"{path} is empty" if not records.damaged else f"{path} is no record of distclip")


def was_clipped(step: Mapping[str, Any]) -> bool:
    """By the clipper's report, or else by norm and threshold."""
    threshold = step.get("threshold", math.inf)
    return bool(step.get("clipped", not isinstance(threshold, dict) and threshold < step["norm"] < math.inf))


def _lines(path: str | os.PathLike[str], records: Records) -> Iterator[dict[str, Any]]:
    """The lines that are whole. The numbers of the others go to ``records.damaged``."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            try:
                yield _parsed(line)
            except ValueError as error:
                records.damaged.append((number, str(error)))
                if number == HOPELESS and not records.headers:
                    raise ValueError(f"{path} is no record of distclip") from None


def _parsed(line: bytes) -> dict[str, Any]:
    """A whole line. Raises ValueError, which says what is wrong with another."""
    try:
        record = _decode(line.decode())
    except (ValueError, RecursionError):  # of JSON and of UTF-8
        raise ValueError("cut off" if not line.endswith(b"\n") else "not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("not a record")
    if "kind" in record:
        if not isinstance(record.get({KIND: "format", "dropped": "steps"}.get(str(record["kind"]), "")), int):
            raise ValueError("a record of an unknown kind")
        return record
    hosts = record.pop("rank_hosts", None)
    for name, value in record.items():
        if type(value) not in PLAIN or name in LISTS:
            record[name] = _checked(name, value)
    if type(record.get("step")) is not int or "norm" not in record:
        raise ValueError("no step and norm")
    if isinstance(hosts, list):
        record["rank_hosts"] = [str(host) for host in hosts]
    return record


def _checked(name: str, value: Any) -> Any:
    if isinstance(value, dict) and name in ("groups", "threshold", "scale"):
        return dict(zip(value, map(_number, value.values()), strict=True))
    if isinstance(value, list) and name == "rank_norms":
        return list(map(_number, value))
    if isinstance(value, list) or name in LISTS:
        raise ValueError(f"{name} is of the wrong kind")
    return _number(value)


def _number(value: Any) -> float:
    if type(value) in PLAIN or (isinstance(value, int) and abs(value) < 2**63):
        return value  # type: ignore[no-any-return]
    if value in ("nan", "inf", "-inf"):
        return float(value)
    raise ValueError(f"{value!r} is no number")


def strict(value: Any) -> Any:
    """Infinities and NaNs as text, since JSON has no numbers for them; in dicts and lists too."""
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
