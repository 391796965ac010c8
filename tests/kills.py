"""Kill training runs at random moments, resume them until their end, and compare with a run that nothing killed.

    python tests/kills.py                          two minutes
    python tests/kills.py --kills 100 --seed 7     so many kills; the seed of a failure makes the same choices again

Each round draws a layout, disks that ranks share or do not, and how it is started: plain, by mpirun, by the launcher.
It kills a rank, what started the ranks, or all of them, anywhere between the start and the end; half of the kills wait
for a checkpoint and hit its writing. Then the same line is started again with --resume. At the end of a round:

- the shards of the last two checkpoints are the same bytes as those of the run without kills;
- the record has each step once, with the same numbers;
- no process is left, no lock, no unfinished step; nothing else in the folder has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from launching import MPIRUN, SHARE_CORES, environment

import distclip as dc

ROOT = Path(__file__).parent.parent
OPTIONS = [
    "--dims",
    "16",
    "--heads",
    "2",
    "--layers",
    "1",
    "--context",
    "16",
    "--batch-size",
    "12",
    "--warm-up",
    "2",
    "--steps",
    "60",
    "--valid-every",
    "8",
    "--valid-batches",
    "1",
    "--checkpoint",
    "ck",
    "--checkpoint-every",
    "2",
    "--record",
    "run.jsonl",
    "--log-every",
    "1",
    "--resume",
]
LAYOUTS = [(1, "dp"), (2, "dp"), (3, "dp"), (2, "fsdp"), (4, "fsdp"), (2, "tp"), (4, "dp+tp")]
OTHERS = ("ck/notes.txt", "ck/step-best/weights", "ck/earlier-1/step-00000001/x", "x/y")  # files that stay as they are
LIMIT_S = 90
GRACE_S = 40  # the job of a launcher that was killed with SIGKILL ends after a while


@dataclass(frozen=True)
class Setting:
    ranks: int
    parallel: str
    start: str  # plain, mpirun, launcher
    apart: bool  # a disk for each rank

    def folders(self, folder: Path) -> list[Path]:
        return [folder / str(rank) for rank in range(self.ranks)] if self.apart else [folder]

    def command(self, folder: Path) -> list[str]:
        script = [str(ROOT / "launch/train.py"), "--parallel", self.parallel, *OPTIONS]
        python = [sys.executable, *script]
        if self.start == "plain":
            return python
        if self.start == "launcher":
            return [sys.executable, "-m", "distclip", "launch", "--hosts", f"localhost:{self.ranks}", *script]
        if not self.apart:
            return [str(MPIRUN), *SHARE_CORES, "-n", str(self.ranks), *python]
        command = [str(MPIRUN), *SHARE_CORES]
        for disk in self.folders(folder):
            command += ["-n", "1", "--wdir", str(disk), *python, ":"]
        return command[:-1]


def draw(choose: random.Random) -> Setting:
    ranks, parallel = choose.choice(LAYOUTS)
    start = "plain" if ranks == 1 else choose.choice(["mpirun", "mpirun", "launcher"])
    return Setting(ranks, parallel, start, apart=start == "mpirun" and choose.random() < 0.5)


# -------------------------------------------------------------------------------------------------------- one run


class Run:
    """A run in a session of its own. What it writes goes to a file of the folder."""

    def __init__(self, setting: Setting, folder: Path):
        self.setting, self.folder = setting, folder
        self.begun = time.monotonic()
        env = environment() | {"TMPDIR": str(folder.parent / "tmp"), "MPIRUN_ARGS": " ".join(SHARE_CORES[4:])}
        with (folder.parent / "output").open("ab") as output:
            self.process = subprocess.Popen(
                setting.command(folder),
                cwd=setting.folders(folder)[0],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def wait_for_a_checkpoint(self, seconds: float) -> None:
        """Until a checkpoint appears or gets its name."""
        before, deadline = self._steps(), time.monotonic() + seconds
        while self.process.poll() is None and self._steps() == before and time.monotonic() < deadline:
            time.sleep(0.001)

    def _steps(self) -> list[str]:
        return [path.name for disk in self.setting.folders(self.folder) for path in disk.glob("ck/*step-0*")]

    def kill(self, victim: str, number: int, choose: random.Random) -> str:
        """Send a signal, and return to whom; to what started the ranks where no rank runs yet."""
        pids = {"all": self._running(), "rank": self._ranks()}.get(victim, [])
        victims = pids if victim == "all" else [choose.choice(sorted(pids))] if pids else [self.process.pid]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return victim if victim == "all" or pids else self.setting.start

    def _ranks(self) -> list[int]:
        return [pid for pid in self._running() if is_rank(pid)]

    def _running(self) -> list[int]:
        """The processes of this run: the launcher's mpirun has a session of its own, but their TMPDIR is the same."""
        mark, pids = f"TMPDIR={self.folder.parent / 'tmp'}\0".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    pids.append(int(path.parent.name))
        return pids

    def left(self) -> list[int]:
        """The processes that still run when the run should have ended."""
        deadline = time.monotonic() + GRACE_S
        while (pids := self._running()) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return pids


def is_rank(pid: int) -> bool:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        return words[0] == sys.executable and words[1].endswith("train.py")
    return False


# ------------------------------------------------------------------------------------------------------- one round


def prepare(setting: Setting, folder: Path) -> None:
    (folder.parent / "tmp").mkdir(parents=True)
    for disk in setting.folders(folder):
        for name in OTHERS:
            (disk / name).parent.mkdir(parents=True, exist_ok=True)
            (disk / name).write_text(name)


def outcome(setting: Setting, folder: Path) -> dict[str, object]:
    """What a run leaves: digests of shards, the names of all files, and the record without its times."""
    result: dict[str, object] = {}
    for i, disk in enumerate(setting.folders(folder)):
        for path in sorted(path for path in disk.rglob("*") if path.is_file()):
            data = path.read_bytes() if path.suffix in (".safetensors", "", ".txt") else b""
            result[f"{i}/{path.relative_to(disk)}"] = hashlib.sha256(data).hexdigest()
    steps = dc.read_records(setting.folders(folder)[0] / "run.jsonl").steps
    result["record"] = [{k: v for k, v in step.items() if k not in ("time", "step_s")} for step in steps]
    return result


def undisturbed(setting: Setting, folder: Path) -> tuple[dict[str, object], float]:
    """The outcome of a run without kills, and its seconds."""
    prepare(setting, folder)
    run = Run(setting, folder)
    ended = run.wait(LIMIT_S)
    seconds = time.monotonic() - run.begun
    left = run.left()
    demand(ended and run.process.returncode == 0 and not left, f"a run without kills failed, or left {left}")
    return outcome(setting, folder), seconds


def disturb(setting: Setting, folder: Path, seconds: float, choose: random.Random, kills: Counter[str]) -> None:
    """Start the run until it comes to its end, and kill it until then."""
    prepare(setting, folder)
    for _ in range(40):
        run = Run(setting, folder)
        victim = choose.choice(["rank", "rank", "start", "all"])
        number = choose.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        at, tiny, on_write = choose.uniform(0, 0.8 * seconds), choose.uniform(0, 0.05), choose.random() < 0.5
        if not run.wait(at) and on_write:
            run.wait_for_a_checkpoint(seconds)
            time.sleep(tiny)
        if run.process.poll() is None:
            kills[run.kill(victim, number, choose)] += 1
            left = run.left()
            demand(not left, f"{setting}: after signal {int(number)} to {victim} processes {left} were left")
        else:
            demand(run.process.returncode == 0, f"{setting}: a resumed run ended with {run.process.returncode}")
            demand(not run.left(), f"{setting}: a run that ended well left processes")
            return
    run = Run(setting, folder)  # killed often enough
    demand(run.wait(LIMIT_S) and run.process.returncode == 0, f"{setting}: the last resume failed")
    demand(not run.left(), f"{setting}: a run that ended well left processes")


def demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def compare(setting: Setting, expected: dict[str, object], found: dict[str, object]) -> None:
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    demand(not names, f"{setting}: not as in the run without kills: {', '.join(names)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="begin no round after this (default: %(default)s)")
    parser.add_argument("--kills", type=int, help="begin rounds until so many kills instead")
    parser.add_argument("--seed", type=int, default=random.getrandbits(31))
    args = parser.parse_args()
    print(f"kills: seed {args.seed}", flush=True)
    choose, kills, begun = random.Random(args.seed), Counter[str](), time.monotonic()
    references: dict[Setting, tuple[dict[str, object], float]] = {}
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    rounds = 0
    try:
        while sum(kills.values()) < args.kills if args.kills else time.monotonic() < begun + args.seconds:
            setting, rounds = draw(choose), rounds + 1
            if setting not in references:
                references[setting] = undisturbed(setting, folder / f"whole-{rounds}" / "run")
            expected, seconds = references[setting]
            before, since = sum(kills.values()), time.monotonic()
            disturb(setting, folder / f"killed-{rounds}" / "run", seconds, choose, kills)
            compare(setting, expected, outcome(setting, folder / f"killed-{rounds}" / "run"))
            shutil.rmtree(folder / f"killed-{rounds}")
            disks = "on disks of their own" if setting.apart else "on one disk"
            which = f"{setting.ranks} ranks by {setting.start}, {setting.parallel}, {disks}"
            print(f"{which}: {sum(kills.values()) - before} kills in {time.monotonic() - since:.0f} s", flush=True)
    except AssertionError as error:
        output = next(folder.glob(f"*-{rounds}/output"), folder)
        tail = output.read_text(errors="replace")[-3000:] if output.is_file() else ""
        print(f"kills: FAILED in round {rounds}, seed {args.seed}: {error}\nfiles: {folder}\n{tail}", flush=True)
        return 1
    shutil.rmtree(folder)
    total = ", ".join(f"{count} {victim}" for victim, count in sorted(kills.items()))
    print(
        f"kills: {sum(kills.values())} kills ({total}) in {rounds} rounds, {time.monotonic() - begun:.0f} s: same bits"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
