"""The checkpoints in a folder on one disk: written, verified, set aside, removed. No rank speaks to another here.

The checkpoint of a step is a folder, ``step-00000100``, or ``.step-00000100`` as long as it is not complete. It has a
file of arrays for each shard that this disk keeps, and ``checkpoint.json``: the facts of the step, with the size and
the digest of every file, and a digest of the facts themselves. Nothing with another name is ever touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

Facts = dict[str, Any]  # of a step: its number, its run, random keys of all ranks, its files, the settings of the run
FACTS, REMOVED = "checkpoint.json", ".removed-"
READ_BYTES = 1 << 22


class Step(NamedTuple):
    """A folder with the name of a step."""

    path: Path
    number: int
    unfinished: bool


def steps_in(folder: Path) -> list[Step]:
    """The steps that are there, the oldest first. A folder without a file of a checkpoint is none."""
    steps = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            match = re.fullmatch(r"(\.?)step-(\d{8,})", path.name)
            if match and (match[1] or (path / FACTS).exists() or any(path.glob("shard-*.safetensors"))):
                steps.append(Step(path, int(match[2]), bool(match[1])))
    return sorted(steps, key=lambda step: step.number)


def whole(folder: Path, number: int) -> Path:
    return folder / f"step-{number:08d}"


def unfinished(folder: Path, number: int) -> Path:
    return folder / f".step-{number:08d}"


def earlier(folder: Path) -> list[str]:
    """The names of the folders to which checkpoints of earlier runs were moved."""
    return sorted(path.name for path in folder.glob("earlier-[0-9]*"))


# -------------------------------------------------------------------------------------------------- write and read


def write_arrays(path: Path, arrays: dict[str, mx.array]) -> list[Any]:
    """Write a file of arrays, and return its size and digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), arrays)
    flush(path)
    return measure(path)


def write_facts(folder: Path, facts: Facts) -> None:
    (folder / FACTS).write_text(json.dumps(facts | {"digest": digest_of(facts)}))
    flush(folder / FACTS)
    flush(folder)


def read_facts(step: Step) -> Facts:
    """The facts of a step. Raises ValueError, which says what is wrong with them. Earlier versions wrote no digests."""
    try:
        facts = json.loads((step.path / FACTS).read_bytes())
        digest = facts.pop("digest", None)
        current = digest == digest_of(facts)
        older = digest is None and "files" not in facts
        keys = [[int(word) for word in key] for key in facts["random"]]
        right = facts["step"] == step.number and keys and all(len(key) == 2 for key in keys)
        if right and (current or older) and {"run", "shards"} <= facts.keys():
            return dict(facts)
    except OSError as error:
        raise ValueError(f"{step.path / FACTS} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{step.path / FACTS} is damaged")


def verify(path: Path, facts: Facts) -> str:
    """What is wrong with a file of arrays; empty if nothing is."""
    try:
        if "files" in facts:
            size, digest = facts["files"][path.name]
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size:,} bytes, not {size:,}"
            return "" if measure(path) == [size, digest] else f"{path} is damaged: its digest is another"
        mx.eval(mx.load(str(path)))  # of an earlier version: it can at least be read
        return ""
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        return f"{path} cannot be read ({error})"


def measure(path: Path) -> list[Any]:
    """The size of a file in bytes and its SHA-256: 1 to 2 GB/s on one core."""
    size, digest = 0, hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]


def digest_of(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def flush(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk itself: a host may lose power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ move and remove


def publish(folder: Path, number: int) -> None:
    """Give a step that is complete its name. Another rank that shares the disk may have been faster."""
    with contextlib.suppress(FileNotFoundError):
        unfinished(folder, number).rename(whole(folder, number))
    flush(folder)


def set_aside(steps: list[Step]) -> Path:
    """Move steps to a new folder beside them, ``earlier-1`` or the next that is free, and return it."""
    parent = steps[0].path.parent
    number = 1
    while (target := parent / f"earlier-{number}").exists():
        number += 1
    target.mkdir()
    for step in steps:
        if step.path.is_symlink():  # a relative link would lead elsewhere from there
            (target / step.path.name).symlink_to(step.path.resolve())
            step.path.unlink()
        else:
            step.path.rename(target / step.path.name)
    return target


def remove(step: Step) -> None:
    """Rename it first, so that a kill leaves no half of a checkpoint under a step's name. Of a link the link goes."""
    hidden = step.path.with_name(f"{REMOVED}{step.path.name.lstrip('.')}")
    delete(hidden)
    with contextlib.suppress(FileNotFoundError):
        step.path.rename(hidden)
    delete(hidden)


def remove_rest(folder: Path) -> None:
    """What a kill has left of steps that were being removed."""
    for path in folder.glob(f"{REMOVED}step-*"):
        delete(path)


def delete(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def run_of(step: Step) -> Any:
    """The number of the run that wrote a step; None where its facts are damaged."""
    with contextlib.suppress(ValueError):
        return read_facts(step)["run"]
    return None


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
