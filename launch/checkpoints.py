"""Checkpoints that are whole after a kill at any moment, on disks that hosts share or do not share.

    checkpoints = Checkpoints("runs/train", world, mesh, settings)
    checkpoints.save(step, model, optimizer)
    step = checkpoints.load(model, optimizer)      # the newest whole step, 0 without any

Every rank makes the same calls. The checkpoint of a step is a folder, ``step-00000100``: ``checkpoint.json``, and a
file of arrays for each shard of the model, which the first rank of each dp group writes. Ranks write to
``.step-00000100`` on their own disks, and rename it when all have written. The last two steps are kept, so one of them
is whole over all ranks whenever a run is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import time
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

import distclip as dc

Facts = dict[str, Any]  # of a checkpoint: its step, its run, random keys of all ranks, and the settings of the run


class Checkpoints:
    """Save and load the state of a run. All methods are collective.

    Args:
        folder: on each rank's host, shared or not.
        world: all ranks.
        mesh: has the axes dp, fsdp and tp. Ranks that differ on dp alone hold the same arrays.
        settings: what a resumed run must have in common with the run that saved, as JSON values.
    """

    def __init__(self, folder: str, world: dc.World, mesh: dc.Mesh, settings: Facts):
        self.folder, self.world, self.mesh = Path(folder).absolute(), world, mesh
        self.settings = settings | {"shards": mesh.size("fsdp", "tp")}
        self.file = self._file(world.rank)
        self.writes = mesh.coordinates()["dp"] == 0  # the other dp ranks hold copies
        self.run: int = self._gather(random.getrandbits(31))[0]  # tells the checkpoints of one run from another's

    # ------------------------------------------------------------------------------------------------ saving

    def save(self, step: int, model: nn.Module, optimizer: dc.ClippedOptimizer) -> None:
        """Save a step on all ranks, or end the job with a message and keep the earlier checkpoints."""
        arrays = flatten(model, optimizer)
        keys = self._gather(mx.random.state[0].tolist())  # type: ignore[index]
        failure: Exception | None = None
        if self.writes:
            try:
                self._write(arrays, self.settings | {"run": self.run, "step": step, "random": keys})
            except (OSError, RuntimeError) as error:  # MLX raises RuntimeError
                failure = error
        if any(self._gather(failure is not None)):
            self._give_up(step, failure, size=sum(array.nbytes for array in arrays.values()))
        if self.writes:
            rename(self._unfinished(step), self._whole(step))
            flush(self.folder)
            for old in self._steps("step-")[:-2]:
                remove(old)

    def _write(self, arrays: dict[str, mx.array], facts: Facts) -> None:
        folder = self._unfinished(facts["step"])
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / self.file), arrays)
        flush(folder / self.file)
        (folder / "checkpoint.json").write_text(json.dumps(facts))
        flush(folder / "checkpoint.json")
        flush(folder)

    def _give_up(self, step: int, failure: Exception | None, size: int) -> NoReturn:
        shutil.rmtree(self._unfinished(step), ignore_errors=True)
        self.world.barrier()  # wait: the first rank to leave ends the others
        message = (
            f"rank {self.world.rank} of {self.world.size} on {socket.gethostname()} cannot write the checkpoint of "
            f"step {step} to {self.folder}: {failure} (it takes {size:,} bytes, and {free_bytes(self.folder):,} are "
            "free). The earlier checkpoints are whole: make room, and go on with --resume"
        )
        leave(None if failure is None else message)

    def start_afresh(self) -> None:
        """Move the checkpoints of an earlier run to another folder."""
        if self._steps("step-"):
            number = 1
            while (moved := self.folder.with_name(f"{self.folder.name}-{number}")).exists():
                number += 1
            if rename(self.folder, moved):
                host = f" on {socket.gethostname()}" if self.world.size > 1 else ""
                print(f"earlier checkpoints in {self.folder}{host} are now in {moved}", flush=True)
        for unfinished in self._steps(".step-"):
            remove(unfinished)
        self.world.barrier()  # wait: another rank may move or remove what this one is about to write

    # ----------------------------------------------------------------------------------------------- loading

    def load(self, model: nn.Module, optimizer: dc.ClippedOptimizer) -> int:
        """Load the newest step that is whole over all ranks, and return it; 0 if there is no checkpoint."""
        disks = self._gather(self._disk())
        facts = self._newest_whole(disks)
        if facts is None:
            if self.world.rank == 0:
                print(f"--resume: no rank has a checkpoint in {self.folder}: starting from the beginning", flush=True)
            self._remove_after(0)
            return 0
        step = int(facts["step"])
        self._remove_after(step)
        reads = self._readers(disks, step)[self.file] == self.world.rank
        arrays: Any = tree_unflatten(list(self._read(step, reads, flatten(model, optimizer)).items()))
        model.update(arrays["model"])
        optimizer.state = arrays["optimizer"]
        mx.eval(model.parameters(), optimizer.state)
        self.run = facts["run"]
        high, low = facts["random"][self.world.rank % len(facts["random"])]  # more ranks than before share keys
        mx.random.seed(high << 32 | low)
        return step

    def _disk(self) -> dict[str, Any]:
        """Where this rank keeps its checkpoints, and the facts of each, with whether this rank's file is there."""
        steps = []
        for folder in [*self._steps("step-"), *self._steps(".step-")]:
            with contextlib.suppress(OSError, ValueError):  # a kill may leave half of an unfinished step
                facts = json.loads((folder / "checkpoint.json").read_text())
                complete = (folder / self.file).exists()
                steps.append(facts | {"complete": complete, "unfinished": folder.name.startswith(".")})
        return {"where": f"rank {self.world.rank} on {socket.gethostname()}, in {self.folder}", "steps": steps}

    def _newest_whole(self, disks: list[dict[str, Any]]) -> Facts | None:
        """The facts of the newest step of which every file exists, or None if no rank has a checkpoint."""
        saved = [
            facts | {"where": disk["where"]} for disk in disks for facts in disk["steps"] if not facts["unfinished"]
        ]
        saved.sort(key=lambda facts: -facts["step"])
        for facts in saved:
            self._check(facts, saved[0])
        for facts in saved:
            if len(self._readers(disks, facts["step"])) == self.settings["shards"]:
                return dict(facts)
        if saved:
            self._refuse(
                f"no step is whole over all ranks.{''.join(map(self._inventory, range(len(disks)), disks))}\n"
                "Put back what is missing, or start afresh without --resume"
            )
        return None

    def _check(self, facts: Facts, newest: Facts) -> None:
        """Refuse a checkpoint that this run cannot load, or that is of another run than the newest."""
        step = f"step {facts['step']} of {facts['where']},"
        unsharded = facts.get("shards") == self.settings["shards"] == 1  # any number of dp ranks can load it
        for name, value in self.settings.items():
            if facts.get(name) != value and not (name == "parallel" and unsharded):
                self._refuse(
                    f"{step} was written with {name} = {facts.get(name)}, and this run has {value}: resume it with the "
                    "options it was started with, or start afresh without --resume"
                )
        if facts["run"] != newest["run"]:
            other = f"step {newest['step']} of {newest['where']}"
            self._refuse(f"{step} and {other}, are of different runs: move away the one that is not to go on")

    def _inventory(self, rank: int, disk: dict[str, Any]) -> str:
        steps = [str(facts["step"]) for facts in disk["steps"] if facts["complete"]]
        return f"\n  {disk['where']}: {self._file(rank)} of steps {', '.join(steps or ['none'])}"

    def _readers(self, disks: list[dict[str, Any]], step: int) -> dict[str, int]:
        """The first rank that has each file of a step. Files that no rank has are left out."""
        ranks = [
            rank
            for rank, disk in enumerate(disks)
            if any(facts["step"] == step and facts["complete"] for facts in disk["steps"])
        ]
        return {self._file(rank): rank for rank in reversed(ranks)}

    def _read(self, step: int, reads: bool, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """The saved arrays in place of ``arrays``: from this rank's file, or from the dp rank that reads it."""
        path = self._whole(step) / self.file
        saved: Any = mx.load(str(path)) if reads else None
        if reads and shapes(saved) != shapes(arrays):
            raise SystemExit(f"--resume: {path} does not hold the arrays that this model and this optimizer have")
        for name in sorted(arrays):
            array = saved.pop(name) if reads else mx.zeros_like(arrays[name])
            arrays[name] = self._add_bits(array)
            mx.eval(arrays[name])  # one after the other, to hold one copy at a time
        return arrays

    def _add_bits(self, array: mx.array) -> mx.array:
        """The array of the dp rank that reads; the others have zeros. Integers, since -0.0 + 0.0 is 0.0."""
        integers = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.itemsize]
        with mx.stream(self.world.stream):  # where no GPU waits for the rank that reads
            bits = mx.distributed.all_sum(array.reshape(-1).view(integers), group=self.mesh.group("dp"))
            return bits.view(array.dtype).reshape(array.shape)

    def _remove_after(self, step: int) -> None:
        """Remove the checkpoints that are newer than a step, which all ranks have written, and unfinished ones."""
        if step and (self._unfinished(step) / "checkpoint.json").exists():  # killed before it was renamed
            rename(self._unfinished(step), self._whole(step))
        for folder in [*self._steps(".step-"), *self._steps("step-")]:
            if folder.name.startswith(".") or folder > self._whole(step):
                remove(folder)

    def _refuse(self, why: str) -> NoReturn:
        leave(f"--resume: {why}" if self.world.rank == 0 else None)  # all ranks come to the same conclusion

    # ------------------------------------------------------------------------------------------ files and ranks

    def _file(self, rank: int) -> str:
        place = self.mesh.coordinates(rank)
        return f"shard-{place['fsdp'] * self.mesh.size('tp') + place['tp']}.safetensors"

    def _whole(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _unfinished(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}"

    def _steps(self, prefix: str) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(path for path in self.folder.iterdir() if path.name.startswith(prefix))
        return []

    def _gather(self, value: Any) -> list[Any]:
        """A JSON value of each rank. No rank returns before every rank has called."""
        return [json.loads(text) for text in self.world.gather(json.dumps(value))]


def leave(message: str | None) -> NoReturn:
    """End all ranks, those with a message first: mpirun may drop output that comes after the first end."""
    if message is None:
        time.sleep(0.5)
    raise SystemExit(message or 1)


def flatten(model: nn.Module, optimizer: dc.ClippedOptimizer) -> dict[str, mx.array]:
    """All arrays of a checkpoint by their paths."""
    return dict(tree_flatten({"model": model.parameters(), "optimizer": optimizer.state}))


def shapes(arrays: dict[str, mx.array]) -> dict[str, Any]:
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def flush(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk itself: a host may lose power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, name: Path) -> bool:
    """Whether this rank renamed it: another rank that shares the disk may have been faster."""
    try:
        path.rename(name)
    except FileNotFoundError:
        return False
    return True


def remove(folder: Path) -> None:
    """Rename first, so that a kill leaves no half of a checkpoint under a step's name."""
    if not folder.name.startswith("."):
        hidden = folder.with_name(f".{folder.name}")
        rename(folder, hidden)
        folder = hidden
    shutil.rmtree(folder, ignore_errors=True)  # another rank may do the same


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
