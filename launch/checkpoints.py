"""Checkpoints that are whole after a kill at any moment, on disks that hosts share or do not share.

    checkpoints = Checkpoints("runs/train", world, mesh, settings)
    checkpoints.own()                              # no other run writes there as long as this one lives
    step = checkpoints.load(model, optimizer)      # the newest whole step, 0 without any; or checkpoints.start_afresh()
    checkpoints.save(step, model, optimizer)

Every rank makes the same calls. The first rank of each dp group writes the arrays of its shard (folders.py) to
``.step-00000100`` on its own disk. It becomes ``step-00000100`` when all have written. The last two steps are kept, so
one of them is whole over all ranks whenever a run is killed. Only steps of this run are ever removed.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

import distclip as dc
import folders
from distclip.lock import DYING_S, Lock, describe
from folders import Facts, Step

HARD = ("shards",)  # settings of which a change cannot be taken
REMEDY = "Put back what is missing, or start afresh without --resume"


class Checkpoints:
    """Save and load the state of a run. All methods are collective.

    Args:
        folder: on each rank's host, shared or not.
        world: all ranks.
        mesh: has the axes dp, fsdp and tp. Ranks that differ on dp alone hold the same arrays.
        settings: what a resumed run must have in common with the run that saved, as JSON values, the same on all ranks.
    """

    def __init__(self, folder: str, world: dc.World, mesh: dc.Mesh, settings: Facts):
        self.folder, self.world, self.mesh = Path(folder).absolute(), world, mesh
        self.settings = settings | {"shards": mesh.size("fsdp", "tp")}
        self.file = self._file(world.rank)
        self.writes = mesh.coordinates()["dp"] == 0  # the other dp ranks hold copies
        self.run: int = self._gather(random.getrandbits(31))[0]  # tells the checkpoints of one run from another's
        self.lock = Lock(self.folder / ".checkpoints.lock", run=self.run, rank=world.rank)
        self.keeps_order = False  # this rank moves and removes steps on its disk, alone of the ranks that share it
        self.previous, self.warned = 0, False  # the step before, which is kept
        world.on_end(self.lock.release)
        self._end_if(self._difference(self._gather(self.settings)))

    # ---------------------------------------------------------------------------------------------- the owner

    def own(self) -> None:
        """Take the folder for this run, or end all ranks with one line that says who has it."""
        touches, failure = attempt(self._make_folder)
        self._end_if(failure and f"the folder of checkpoints {self.folder} cannot be used: {failure}")
        deadline = time.monotonic() + DYING_S
        while True:
            taken = not touches or self.lock.take()
            self.world.barrier()  # the owner has written that it is the owner
            owner = self.lock.owner() if touches else {}
            ours = owner.get("run") == self.lock.facts["run"]
            late, right = self._gather(time.monotonic() > deadline)[0], self._gather(taken or ours)
            if all(right):
                break
            if late:
                text = f"{self.folder} on {socket.gethostname()} is in use by {describe(owner)}"
                self._end_if(None if taken or ours else f"{text}: wait for its end, or take another folder")
            if not right[0]:  # of two runs that start together, that with the disk of rank 0 gets all disks
                self.lock.release()
            time.sleep(0.1)
        self.keeps_order = ours and owner.get("rank") == self.world.rank
        if touches and self.lock.problem and not ours:
            self.keeps_order = self.writes
        problems = {problem for problem in self._gather(self.lock.problem) if problem}
        if problems and not self.warned:
            text = f"({', '.join(sorted(problems))}): take care that no other run uses it"
            self._say(f"the folder of checkpoints {self.folder} cannot be locked {text}")
        self.warned = True

    def _make_folder(self) -> bool:
        """Whether this rank uses the folder: it writes there, or may find checkpoints."""
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder.exists()

    def start_afresh(self) -> None:
        """Move the checkpoints of earlier runs to a folder inside, ``earlier-1`` or the next that is free."""
        moved, failure = attempt(self._move_all) if self.keeps_order else (None, None)
        self._end_if(failure and f"the earlier checkpoints in {self.folder} cannot be moved: {failure}")
        if moved:
            host = f" on {socket.gethostname()}" if self.world.size > 1 else ""
            print(f"earlier checkpoints in {self.folder}{host} are now in {moved}", flush=True)

    def _move_all(self) -> Path | None:
        steps = folders.steps_in(self.folder)
        torn = [step for step in steps if step.unfinished and folders.run_of(step) is None]
        for step in torn:
            folders.remove(step)
        moving = [step for step in steps if step not in torn]
        return folders.set_aside(moving) if moving else None

    # ------------------------------------------------------------------------------------------------ saving

    def save(self, step: int, model: nn.Module, optimizer: dc.ClippedOptimizer) -> None:
        """Save a step on all ranks, or end the job with a message and keep the earlier checkpoints."""
        self.own()  # again, should its lock have been removed
        arrays = flatten(model, optimizer)
        unfinished, facts = folders.unfinished(self.folder, step), self.settings | {"run": self.run, "step": step}
        size = sum(array.nbytes for array in arrays.values())

        def tried(action: Callable[[], Any], needed: bool) -> Any:
            result, failure = attempt(action) if needed else (None, None)
            if any(self._gather(failure is not None)):
                shutil.rmtree(unfinished, ignore_errors=True)
            self._end_if(failure and self._cannot_write(step, size, failure))
            return result

        file = tried(lambda: folders.write_arrays(unfinished / self.file, arrays), self.writes)
        written = self._gather([self.file, file, mx.random.state[0].tolist()])  # type: ignore[index]
        facts["random"] = [keys for _, _, keys in written]
        facts["files"] = {name: file for name, file, _ in written if file}
        tried(lambda: self._make_way(step), self.keeps_order)
        tried(lambda: folders.write_facts(unfinished, facts), self.writes)
        tried(lambda: folders.publish(self.folder, step), self.writes)
        self._remove(lambda old: old.number not in (step, self.previous))
        self.previous = step

    def _cannot_write(self, step: int, size: int, failure: str) -> str:
        where, free = f"step {step} to {self.folder}", f"{folders.free_bytes(self.folder):,}"
        return (
            f"rank {self.world.rank} of {self.world.size} on {socket.gethostname()} cannot write the checkpoint of "
            f"{where}: {failure} (it takes {size:,} bytes, and {free} are free). The earlier checkpoints are whole: "
            "make room, and go on with --resume"
        )

    def _make_way(self, number: int) -> None:
        """A damaged step of this run that has the number of the next goes; another run's moves aside."""
        for old in folders.steps_in(self.folder):
            if old.number == number and not old.unfinished:
                if folders.run_of(old) == self.run:
                    folders.remove(old)
                else:
                    folders.set_aside([old])

    def _remove(self, chosen: Callable[[Step], bool]) -> None:
        """Remove the chosen ones of this run's steps, and what kills have cut off."""

        def remove() -> None:
            for step in filter(chosen, folders.steps_in(self.folder)):
                if folders.run_of(step) in ((self.run, None) if step.unfinished else (self.run,)):
                    folders.remove(step)
            folders.remove_rest(self.folder)

        _, failure = attempt(remove) if self.keeps_order else (None, None)
        if failure:
            where = f"{self.folder} on {socket.gethostname()}"
            print(f"old checkpoints in {where} cannot be removed: {failure}", flush=True)

    # ----------------------------------------------------------------------------------------------- loading

    def load(self, model: nn.Module, optimizer: dc.ClippedOptimizer, allow_changed: bool = False) -> int:
        """Load the newest step that is whole over all ranks, and return it; 0 if there is no checkpoint.

        A step that is damaged on a rank is left out, with a line. ``allow_changed`` takes other settings than those of
        the run that saved, with a line for each.
        """
        disk, failure = attempt(self._disk)
        self._end_if(failure and f"--resume: {self.folder} on {socket.gethostname()} cannot be read: {failure}")
        disks = self._gather(disk)
        earlier = sorted({name for disk in disks for name in disk["earlier"]})
        note = f" (earlier runs: {', '.join(earlier)})" if earlier else ""
        arrays = flatten(model, optimizer)
        facts = self._newest_whole(disks, allow_changed)
        if facts is None:
            self._say(f"--resume: no rank has a checkpoint in {self.folder}{note}: starting from the beginning")
            self.start_afresh()
            return 0
        step, name = int(facts["step"]), self._readers(disks, facts).get(self.world.rank)
        path = self.folder / name if name else None
        saved: Any = mx.load(str(path / self.file)) if path else None
        unlike = saved is not None and shapes(saved) != shapes(arrays)
        self._end_if(
            f"--resume: {path} does not hold the arrays that this model and this optimizer have" if unlike else None
        )
        self._say(f"--resume: going on from step {step} in {self.folder}{note}")
        trees: Any = tree_unflatten(list(self._share(saved, arrays).items()))
        model.update(trees["model"])
        optimizer.state = trees["optimizer"]
        mx.eval(model.parameters(), optimizer.state)
        self.run, self.previous = facts["run"], step
        high, low = facts["random"][self.world.rank % len(facts["random"])]  # more ranks than before share keys
        mx.random.seed(high << 32 | low)
        self._finish(step, path)
        return step

    def _finish(self, step: int, path: Path | None) -> None:
        """Give the step that was loaded its name, if a kill came before, and remove what other kills have cut off."""

        def rename() -> None:
            self._make_way(step)
            folders.publish(self.folder, step)

        if self.keeps_order and path and path.name.startswith("."):
            attempt(rename)  # where it fails, the step is read under this name again
        self._remove(lambda old: old.unfinished and old.number < step)

    def _disk(self) -> dict[str, Any]:
        """Where this rank keeps its checkpoints, the facts of each, and what is wrong with those that are not whole."""
        steps = []
        for step in folders.steps_in(self.folder):
            entry = {"name": step.path.name, "number": step.number, "unfinished": step.unfinished, "problem": ""}
            try:
                entry["facts"] = folders.read_facts(step)
            except ValueError as error:
                entry["problem"] = str(error)
            steps.append(entry | {"complete": (step.path / self.file).exists()})
        place = {"host": socket.gethostname(), "folder": str(self.folder), "earlier": folders.earlier(self.folder)}
        where = f"rank {self.world.rank} on {place['host']}, in {self.folder}"
        return place | {"where": where, "steps": steps}

    def _newest_whole(self, disks: list[dict[str, Any]], allow_changed: bool) -> Facts | None:
        """The facts of the newest step of which every file is whole, or None if no rank has a checkpoint."""
        entries = [entry | {"where": disk["where"]} for disk in disks for entry in disk["steps"]]
        entries.sort(key=lambda entry: -entry["number"])
        saved = [entry for entry in entries if not entry["problem"]]  # one that has its facts lacks only its name
        for entry in saved:
            self._check_run(entry, saved[0])
        tried: list[Facts] = []
        for entry in saved:
            facts = entry["facts"]
            if facts in tried:
                continue
            changed = self._changed(entry, allow_changed)
            if self._is_whole(facts, disks):
                self._say(*left_out(disks, facts["step"]), *changed)
                return dict(facts)
            tried.append(facts)
        if not all(entry["unfinished"] for entry in entries):
            lines = [*left_out(disks, 0), *map(self._inventory, range(len(disks)), disks)]
            self._refuse("\n  ".join(["no step is whole over all ranks.", *lines]) + f"\n{REMEDY}")
        return None

    def _is_whole(self, facts: Facts, disks: list[dict[str, Any]]) -> bool:
        """Whether some rank has each file of a step whole. Files that are not are marked in ``disks``."""
        while True:
            readers = self._readers(disks, facts)
            if len(readers) < self.settings["shards"]:
                return False
            name = readers.get(self.world.rank)
            problems = self._gather(folders.verify(self.folder / name / self.file, facts) if name else "")
            if not any(problems):
                return True
            for rank, problem in enumerate(problems):
                for other, disk in enumerate(disks if problem else []):  # all ranks that would read the same file
                    for entry in disk["steps"] if self._same_file(disks, rank, other) else []:
                        if entry["name"] == readers[rank]:
                            entry["problem"] = problem

    def _same_file(self, disks: list[dict[str, Any]], rank: int, other: int) -> bool:
        places = [(disks[i]["host"], disks[i]["folder"], self._file(i)) for i in (rank, other)]
        return places[0] == places[1]

    def _changed(self, entry: dict[str, Any], allow_changed: bool) -> list[str]:
        """The settings that differ from those of a step: refused, or allowed, with a line for each."""
        facts, lines = entry["facts"], []
        unsharded = facts["shards"] == self.settings["shards"] == 1  # any number of dp ranks can load it
        for name, value in self.settings.items():
            if name not in facts and "files" not in facts:  # earlier versions wrote fewer
                continue
            if facts.get(name) == value or (name == "parallel" and unsharded):
                continue
            if allow_changed and name not in HARD:
                lines.append(f"--resume: this run has {name} = {value} where the saved one had {facts.get(name)}")
                continue
            change = "" if name in HARD else ", take the change with --allow-changed"
            self._refuse(
                f"step {entry['number']} of {entry['where']}, was written with {name} = {facts.get(name)}, and this "
                f"run has {value}: resume it with the options it was started with{change}, or start afresh without "
                "--resume"
            )
        return lines

    def _check_run(self, entry: dict[str, Any], newest: dict[str, Any]) -> None:
        if entry["facts"]["run"] != newest["facts"]["run"]:
            these = f"step {entry['number']} of {entry['where']}, and step {newest['number']} of {newest['where']}"
            self._refuse(f"{these}, are of different runs: move away the one that is not to go on")

    def _inventory(self, rank: int, disk: dict[str, Any]) -> str:
        steps = [str(entry["number"]) for entry in disk["steps"] if entry["complete"] and not entry["problem"]]
        return f"{disk['where']}: {self._file(rank)} of steps {', '.join(steps or ['none'])}"

    def _readers(self, disks: list[dict[str, Any]], facts: Facts) -> dict[int, str]:
        """The first rank that has each file of a step, with the name of the step there. Files that no rank has are
        left out."""
        readers: dict[str, tuple[int, str]] = {}
        for rank, disk in enumerate(disks):
            for entry in disk["steps"]:  # one that is unfinished on this disk is whole if another has renamed it
                if entry["complete"] and not entry["problem"] and entry["facts"] == facts:
                    readers.setdefault(self._file(rank), (rank, entry["name"]))
        return dict(readers.values())

    def _share(self, saved: dict[str, mx.array] | None, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """The saved arrays in place of ``arrays``, from this rank's file or from the dp rank that reads it."""
        for name in sorted(arrays):
            array = mx.zeros_like(arrays[name]) if saved is None else saved.pop(name)
            arrays[name] = self._add_bits(array)
            mx.eval(arrays[name])  # one after the other, to hold one copy at a time
        return arrays

    def _add_bits(self, array: mx.array) -> mx.array:
        """The array of the dp rank that reads; the others have zeros. Integers, since -0.0 + 0.0 is 0.0."""
        integers = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.itemsize]
        with mx.stream(self.world.stream):  # where no GPU waits for the rank that reads
            bits = mx.distributed.all_sum(array.reshape(-1).view(integers), group=self.mesh.group("dp"))
            return bits.view(array.dtype).reshape(array.shape)

    # -------------------------------------------------------------------------------------------------- ranks

    def _file(self, rank: int) -> str:
        place = self.mesh.coordinates(rank)
        return f"shard-{place['fsdp'] * self.mesh.size('tp') + place['tp']}.safetensors"

    def _gather(self, value: Any) -> list[Any]:
        """A JSON value of each rank. No rank returns before every rank has called."""
        return [json.loads(text) for text in self.world.gather(json.dumps(value))]

    def _difference(self, settings: list[Facts]) -> str | None:
        """Of this rank's settings to rank 0's, which would train another model on other data."""
        for name, value in settings[0].items():
            if (other := settings[self.world.rank].get(name)) != value:
                return f"rank {self.world.rank} on {socket.gethostname()} has {name} = {other}, and rank 0 has {value}"
        return None

    def _say(self, *lines: str) -> None:
        if self.world.rank == 0:
            for line in lines:
                print(line, flush=True)

    def _refuse(self, why: str) -> NoReturn:
        """End all ranks, which have come to the same conclusion."""
        self._leave(f"--resume: {why}" if self.world.rank == 0 else None)

    def _end_if(self, problem: str | None) -> None:
        """End all ranks if one has a problem. The first of those prints it."""
        problems = self._gather(problem)
        if any(problems):
            first = next(rank for rank, text in enumerate(problems) if text)
            self._leave(problem if self.world.rank == first else None)

    def _leave(self, message: str | None) -> NoReturn:
        """Those with a message leave first: mpirun may drop output that comes after the first end."""
        self.lock.release()
        if message is None:
            time.sleep(0.5)
        raise SystemExit(message or 1)


def attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What an action on the disk returns, or its error: no rank may leave while others wait for it."""
    try:
        return action(), None
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError
        return None, str(error) or type(error).__name__


def left_out(disks: list[dict[str, Any]], since: int) -> list[str]:
    """A line for each damaged step from a number on."""
    lines = [
        f"--resume: step {entry['number']} is left out: on {disk['host']}, {entry['problem']}"
        for disk in disks
        for entry in disk["steps"]
        if entry["problem"] and entry["number"] >= since and not entry["unfinished"]
    ]
    return list(dict.fromkeys(lines))


def flatten(model: nn.Module, optimizer: dc.ClippedOptimizer) -> dict[str, mx.array]:
    """All arrays of a checkpoint by their paths."""
    return dict(tree_flatten({"model": model.parameters(), "optimizer": optimizer.state}))


def shapes(arrays: dict[str, mx.array]) -> dict[str, Any]:
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}
