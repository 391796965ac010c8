"""Checkpoints that share a folder, are damaged, or were written with other options: ``launch/checkpoints.py``."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from launching import alone, environment, launch, running_in
from test_train import LIMIT_S, command_of, newest, train, train_apart

import distclip as dc
from distclip.lock import Lock

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
import folders

pytestmark = pytest.mark.launches

TINY: dict[str, Any] = {"dims": 16, "heads": 2, "layers": 1, "context": 16, "batch_size": 12, "warm_up": 1}
TINY |= {"steps": 6, "checkpoint": "ck", "checkpoint_every": 2, "valid_every": 100, "valid_batches": 1}


def start(ranks: int, folder: Path, **options: Any) -> subprocess.Popen[bytes]:
    """A run that goes on for ever. Returns when it has written a checkpoint."""
    command = command_of(ranks, **TINY | {"steps": 10**8, "checkpoint_every": 1} | options)
    with (folder / f"output-{len(list(folder.glob('output-*')))}").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(), start_new_session=True, stdout=output, stderr=output
        )
    deadline = time.monotonic() + LIMIT_S
    while not list((folder / TINY["checkpoint"]).glob("step-*")) and time.monotonic() < deadline:
        assert process.poll() is None, output.name
        time.sleep(0.05)
    return process


def send(process: subprocess.Popen[Any], number: int) -> None:
    """A signal to every process of a run: mpirun gives each rank a process group."""
    for pid in running_in(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if number == signal.SIGKILL:
        process.wait(20)


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -------------------------------------------------------------------------------------------------- one owner


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(ranks: int, resume: bool, tmp_path: Path) -> None:
    first = start(ranks, tmp_path, parallel="fsdp")
    try:
        send(first, signal.SIGSTOP)
        before = bytes_in(tmp_path / "ck")
        more = {"resume": True} if resume else {}
        second, _ = train(ranks, tmp_path, **TINY | {"parallel": "fsdp"} | more)
        assert bytes_in(tmp_path / "ck") == before
        send(first, signal.SIGCONT)
        assert first.poll() is None
    finally:
        send(first, signal.SIGKILL)
    owner = json.loads((tmp_path / "ck/.checkpoints.lock").read_bytes())
    assert second.code != 0
    line = f"{tmp_path}/ck on {owner['host']} is in use by process {owner['pid']} on {owner['host']}, started"
    assert second.output.count(line) == 1, second.output
    assert "Traceback" not in second.output


@pytest.mark.parametrize("parallel", ["dp", "fsdp"])
def test_of_two_runs_that_start_together_one_goes_on(parallel: str, tmp_path: Path) -> None:
    """Each rank has a disk of its own."""
    disks, options = [tmp_path / "0", tmp_path / "1"], TINY | {"parallel": parallel}
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(train_apart, disks, **options) for _ in range(2)]
    ends = [run.result()[0] for run in runs]
    won, lost = sorted(ends, key=lambda ended: ended.code)
    if lost.code == 0:  # it came when the other had ended
        assert "earlier checkpoints in" in lost.output + won.output
    else:
        assert won.code == 0, won.output
        assert lost.output.count("is in use by process") == 1, lost.output
    for disk in disks[: 1 if parallel == "dp" else 2]:
        assert {"step-00000004", "step-00000006"} <= {path.name for path in (disk / "ck").iterdir()}
    assert train_apart(disks, resume=True, **options)[0].code == 0


def test_a_second_run_in_a_record_is_refused(tmp_path: Path) -> None:
    first = start(1, tmp_path, record="run.jsonl")
    try:
        before = (tmp_path / "run.jsonl").stat().st_size
        ended = launch(command_of(2, **TINY | {"record": "run.jsonl", "checkpoint": "other"}), tmp_path)
        assert (tmp_path / "run.jsonl").stat().st_size >= before
    finally:
        send(first, signal.SIGKILL)
    assert ended.code != 0
    assert f"--record: the record {tmp_path}/run.jsonl is being written by process {first.pid} on" in ended.output
    assert "Traceback" not in ended.output
    assert len(dc.read_records(tmp_path / "run.jsonl").headers) == 1


def test_a_killed_run_lets_the_next_one_in_though_a_child_of_it_lives(tmp_path: Path) -> None:
    """A loader's worker, forked with all descriptors, outlives the rank that was killed."""
    program = """
    import os, time
    from pathlib import Path
    from distclip.lock import Lock

    lock = Lock(Path("lock"), run=1)
    assert lock.take() and lock.take()
    worker = os.fork()
    line = "taken" if worker else f"worker {lock.take()}"
    os.write(1, f"{line} {os.getpid()}\\n".encode())  # in one piece
    time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stdout
    lines = sorted(run.stdout.readline().split()[:2] for _ in range(2))
    lock = Lock(tmp_path / "lock", run=2)
    try:
        assert lines == [["taken", str(run.pid)], ["worker", "False"]]
        assert not lock.take()
        assert lock.owner()["pid"] == run.pid
        run.kill()
        assert lock.take_within(5)
        assert running_in(run.pid), "the worker was to live on"
        assert lock.owner()["run"] == 2
    finally:
        send(run, signal.SIGKILL)
        run.stdout.close()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_is_removed_is_made_again(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock")
    assert lock.take()
    (tmp_path / "lock").unlink()
    assert lock.take()
    assert (tmp_path / "lock").exists()
    lock.release()


def test_where_nothing_can_be_locked_it_is_said_and_the_run_goes_on() -> None:
    lock = Lock(Path("/proc/lock"))
    assert lock.take()
    assert lock.problem
    assert lock.owner() == {}


@pytest.mark.parametrize("how", ["lockf", "open"])
def test_a_disk_that_cannot_lock_is_said_once_and_used(how: str, tmp_path: Path) -> None:
    """As NFS without a lock server (ENOLCK); or the lock file cannot be made at all. Three ranks share the disk."""
    refusal = """
    import errno, fcntl, os

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def open(path, *rest, original=os.open):
        if str(path).endswith(".checkpoints.lock"):
            raise OSError(errno.EROFS, "Read-only file system")
        return original(path, *rest)
    """
    last = "fcntl.lockf = lockf\n" if how == "lockf" else "os.open = open\n"
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(refusal) + last)
    for options in (TINY, TINY, TINY | {"resume": True}):
        ended = launch(command_of(3, **options), tmp_path, {"PYTHONPATH": str(tmp_path)}, limit_s=LIMIT_S)
        assert ended.code == 0, ended.output
        assert ended.output.count("cannot be locked (") == 1, ended.output
    assert sorted(path.name for path in (tmp_path / "ck").iterdir() if path.name.startswith("step-")) == [
        "step-00000004",
        "step-00000006",
    ]
    assert len(list((tmp_path / "ck/earlier-1").iterdir())) == 2


def test_ranks_that_share_a_disk_resume_at_once_after_a_kill(tmp_path: Path) -> None:
    run = start(3, tmp_path)
    send(run, signal.SIGKILL)
    assert (tmp_path / "ck/.checkpoints.lock").exists()
    options = TINY | {"steps": newest(tmp_path / "ck") + 2, "checkpoint_every": 1}
    resumed, _ = train(3, tmp_path, resume=True, allow_changed=True, **options)
    assert resumed.code == 0, resumed.output
    assert [path.name for path in (tmp_path / "ck").iterdir() if path.name.startswith(".")] == []


# --------------------------------------------------------------------------------- nothing else is moved or removed


def test_only_steps_move_and_only_when_the_run_can_start(tmp_path: Path) -> None:
    """The folder is a project with a file, a step of another program, and other runs; a link leads to it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "ck").symlink_to("disk")
    for name in ("step-best/x", ".git/x", "other/step-00000001/checkpoint.json", "step-00000099/notes"):
        (tmp_path / "disk" / name).parent.mkdir(parents=True)
        (tmp_path / "disk" / name).write_text("mine")
    first, _ = train(1, tmp_path, **TINY)
    assert first.code == 0, first.output
    before = bytes_in(tmp_path / "disk")
    refused, _ = train(3, tmp_path, **TINY | {"batch_size": 8})
    assert refused.code != 0
    assert bytes_in(tmp_path / "disk") == before
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "disk/step-00000004").rename(elsewhere)
    (tmp_path / "disk/step-00000004").symlink_to("../elsewhere")
    second, _ = train(2, tmp_path, **TINY)
    assert second.code == 0, second.output
    assert second.output.count(f"earlier checkpoints in {tmp_path}/ck on ") == 1
    after = bytes_in(tmp_path / "disk")
    assert (tmp_path / "ck").is_symlink()
    for name, data in before.items():
        kept = name if "step-0000000" not in name or name.startswith("other") else f"earlier-1/{name}"
        if "step-00000004" not in name:
            assert after[kept] == data, name
    assert (tmp_path / "disk/earlier-1/step-00000004/checkpoint.json").read_bytes() == before[
        "step-00000004/checkpoint.json"
    ]
    resumed, _ = train(2, tmp_path, resume=True, **TINY)
    assert resumed.code == 0
    assert "going on from step 6" in resumed.output
    assert "(earlier runs: earlier-1)" in resumed.output


# ------------------------------------------------------------------------------------------------------- damage


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    elif how == "flipped":
        data[-5] ^= 0x40
    elif how == "missing":
        path.unlink()
        return
    else:
        data = bytearray(how.encode())
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("ranks", "file", "how"),
    [
        (1, "shard-0.safetensors", "missing"),
        (2, "shard-0.safetensors", "truncated"),
        (2, "shard-0.safetensors", "flipped"),
        (1, "checkpoint.json", "{}"),
        (2, "checkpoint.json", "missing"),
    ],
)
def test_resume_falls_back_to_the_newest_step_that_is_whole(ranks: int, file: str, how: str, tmp_path: Path) -> None:
    options = TINY | {"parallel": "fsdp"}
    assert train(ranks, tmp_path, **options)[0].code == 0
    before = bytes_in(tmp_path / "ck/step-00000006")
    damage(tmp_path / "ck/step-00000006" / file, how)
    resumed, _ = train(ranks, tmp_path, resume=True, **options)
    assert resumed.code == 0, resumed.output
    if file == "checkpoint.json" or how != "missing":
        line = f"--resume: step 6 is left out: on {os.uname().nodename}, {tmp_path}/ck/step-00000006/{file}"
        assert resumed.output.count(line) == 1, resumed.output
    assert "--resume: going on from step 4" in resumed.output
    after = bytes_in(tmp_path / "ck/step-00000006")
    assert {name: data for name, data in after.items() if name.startswith("shard")} == {
        name: data for name, data in before.items() if name.startswith("shard")
    }
    assert {"step-00000004", "step-00000006"} <= {path.name for path in (tmp_path / "ck").iterdir()}
    assert not [path for path in (tmp_path / "ck").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_lacks_only_its_name_is_whole(ranks: int, tmp_path: Path) -> None:
    """As a kill leaves it just before the first checkpoint gets its name."""
    options = TINY | {"parallel": "fsdp"}
    assert train(ranks, tmp_path, **options)[0].code == 0
    shutil.rmtree(tmp_path / "ck/step-00000004")
    (tmp_path / "ck/step-00000006").rename(tmp_path / "ck/.step-00000006")
    resumed, _ = train(ranks, tmp_path, resume=True, **options)
    assert resumed.code == 0, resumed.output
    assert "--resume: going on from step 6" in resumed.output
    assert [path.name for path in (tmp_path / "ck").iterdir() if path.is_dir()] == ["step-00000006"]


def test_nothing_whole_is_one_error(tmp_path: Path) -> None:
    assert train(1, tmp_path, **TINY)[0].code == 0
    for step in (4, 6):
        damage(tmp_path / f"ck/step-{step:08d}/shard-0.safetensors", "flipped")
    refused, _ = train(2, tmp_path, resume=True, **TINY)
    assert refused.code != 0
    assert refused.output.count("no step is whole over all ranks") == 1
    assert refused.output.count("step-00000004/shard-0.safetensors is damaged") == 1
    assert "Traceback" not in refused.output


def test_another_rank_has_the_file_whole(tmp_path: Path) -> None:
    """Each rank has a disk of its own: the copy on the second is whole."""
    disks = [tmp_path / "0", tmp_path / "1"]
    assert train_apart(disks, **TINY)[0].code == 0
    shutil.copytree(disks[0] / "ck", disks[1] / "ck")
    damage(disks[0] / "ck/step-00000006/shard-0.safetensors", "flipped")
    resumed, _ = train_apart(disks, resume=True, **TINY)
    assert resumed.code == 0, resumed.output
    assert "going on from step 6" in resumed.output


def test_a_checkpoint_without_digests_loads(tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    assert train(1, tmp_path, **TINY)[0].code == 0
    for step in (4, 6):
        path = tmp_path / f"ck/step-{step:08d}/checkpoint.json"
        facts = json.loads(path.read_text())
        names = (
            "parallel",
            "dims",
            "heads",
            "layers",
            "dtype",
            "optimizer",
            "threshold",
            "shards",
            "run",
            "step",
            "random",
        )
        path.write_text(json.dumps({name: facts[name] for name in names}))
    damage(tmp_path / "ck/step-00000006/shard-0.safetensors", "truncated")
    resumed, _ = train(1, tmp_path, resume=True, **TINY)
    assert resumed.code == 0, resumed.output
    assert "step 6 is left out" in resumed.output
    assert "going on from step 4" in resumed.output


def test_random_damage_is_never_loaded(tmp_path: Path) -> None:
    """Bytes at random places of random files: no traceback, and the parameters of a step that was saved."""
    program = f"""
    import os, random, shutil, sys
    import distclip as dc
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from pathlib import Path

    sys.path.insert(0, {str(Path(__file__).parent.parent / "launch")!r})
    from checkpoints import Checkpoints, flatten

    world, choose, settings = dc.init(), random.Random(0), {{"parallel": "dp", "seed": 0}}
    mesh = dc.Mesh(dp=world.size, fsdp=1, tp=1)

    def make():
        model = nn.Linear(3, 2)
        optimizer = dc.ClippedOptimizer(optim.AdamW(1e-3), dc.Clipper(1.0))
        optimizer.init(model.trainable_parameters())
        return model, optimizer

    def bits(model, optimizer):
        leaves = flatten(model, optimizer).items()
        return {{name: bytes(leaf.reshape(-1).view(mx.uint8).tolist()) for name, leaf in leaves}}

    model, optimizer = make()
    saved, checkpoints = {{}}, Checkpoints("ck", world, mesh, settings)
    for step in (1, 2):
        model.weight = mx.random.normal((2, 3))
        checkpoints.save(step, model, optimizer)
        saved[step] = bits(model, optimizer)
    shutil.copytree("ck", "good", ignore=shutil.ignore_patterns(".*"))
    checkpoints.lock.release()
    outcomes = set()
    for trial in range(300):
        shutil.rmtree("ck")
        shutil.copytree("good", "ck")
        for _ in range(choose.choice([1, 1, 2])):
            path = choose.choice(sorted(Path("ck").glob("*/*")))
            data = bytearray(path.read_bytes())
            kind = choose.choice(["flip", "cut", "zero", "insert", "swap", "text"])
            at = choose.randrange(max(len(data), 1))
            if kind == "flip" and data:
                data[at] ^= 1 << choose.randrange(8)
            elif kind == "cut":
                del data[at:]
            elif kind == "zero":
                data[at : at + 64] = bytes(len(data[at : at + 64]))
            elif kind == "insert":
                data[at:at] = choose.randbytes(choose.randrange(9))
            elif kind == "text":
                data = choose.choice([b"{{}}", b"[]", b"", b"null", b"[" * 10**5, b"\\xff", b'{{"random": 1}}'])
            else:
                data = bytearray(choose.choice(sorted(Path("good").glob("*/*"))).read_bytes())
            path.write_bytes(data)
        model, optimizer = make()
        try:
            step = Checkpoints("ck", world, mesh, settings).load(model, optimizer)
            assert bits(model, optimizer) == saved[step], (trial, step)
            outcomes.add(step)
        except SystemExit as error:
            assert "no step is whole" in str(error) or "are of different runs" in str(error), error
            outcomes.add(0)
    print("outcomes:", sorted(outcomes))
    """
    ended = alone(program, tmp_path)
    assert ended.code == 0, ended.output[-3000:]
    assert "outcomes: [0, 1, 2]" in ended.output


# ---------------------------------------------------------------------------------------------- options that change


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("seed", 1, "seed = 0, and this run has 1"),
        ("accumulate", 2, "accumulate = 1, and this run has 2"),
        ("context", 8, "context = 16, and this run has 8"),
        ("batch_size", 6, "batch_size = 12, and this run has 6"),
        ("learning_rate", 0.1, "learning_rate = 0.003, and this run has 0.1"),
        ("data", "text", "data = "),
    ],
)
def test_a_resumed_run_refuses_options_that_changed(option: str, value: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the same words again and again. " * 200)
    options = TINY | {"steps": 2}
    assert train(1, tmp_path, **options)[0].code == 0
    refused, _ = train(1, tmp_path, resume=True, **options | {option: value})
    assert refused.code != 0
    assert f"was written with {said}" in refused.output
    allowed, _ = train(1, tmp_path, resume=True, allow_changed=True, **options | {option: value})
    assert allowed.code == 0, allowed.output
    assert f"--resume: this run has {option} = " in allowed.output


def test_a_change_that_was_allowed_is_kept(tmp_path: Path) -> None:
    """The newest step counts, though the one before has the settings of the beginning."""
    assert train(1, tmp_path, **TINY)[0].code == 0
    more = TINY | {"steps": 8, "resume": True}
    assert train(1, tmp_path, allow_changed=True, **more)[0].code == 0
    resumed, _ = train(1, tmp_path, **more)
    assert resumed.code == 0, resumed.output
    assert "going on from step 8" in resumed.output


def test_ranks_with_other_options_are_refused(tmp_path: Path) -> None:
    alone = command_of(1, **TINY)
    mpirun = command_of(2, **TINY)
    mpirun = mpirun[: len(mpirun) - len(alone)]
    mpirun[1:3] = []
    ended = launch([*mpirun, "-n", "1", *alone, ":", "-n", "1", *alone, "--seed=1"], tmp_path)
    assert ended.code != 0
    assert "rank 1 on " in ended.output
    assert "has seed = 1, and rank 0 has 0" in ended.output


# ------------------------------------------------------------------------------------------------------- the record


def test_the_record_has_each_step_that_a_checkpoint_has_seen(tmp_path: Path) -> None:
    """Killed as soon as a checkpoint is there, again and again."""
    for _ in range(4):
        run = start(1, tmp_path, record="run.jsonl", resume=True)
        time.sleep(random.random() / 4)
        send(run, signal.SIGKILL)
        saved = newest(tmp_path / "ck")
        steps = [step["step"] for step in dc.read_records(tmp_path / "run.jsonl").steps]
        assert steps[:saved] == list(range(1, saved + 1))


def test_flush_puts_the_step_on_the_disk(tmp_path: Path) -> None:
    with dc.Recorder(tmp_path / "a.jsonl") as record:
        record({"step": 1, "norm": 1.0})
        record.flush()
        assert [step["step"] for step in dc.read_records(tmp_path / "a.jsonl").steps] == [1]
        record({"step": 2, "norm": mx.array(2.0)})
        record.flush()
        record.flush()
        assert len(dc.read_records(tmp_path / "a.jsonl").steps) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


# ------------------------------------------------------------------------------------------------- what a step is


def test_steps_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """A ninth digit does not make a step older. Other names are no steps."""
    for name in ("step-100000000", "step-99999999", ".step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").write_text("{}")
    for name in ("step-7", "step-00000007", "step-00000008.bak", "earlier-1", "step-best"):
        (tmp_path / name).mkdir()
    steps = folders.steps_in(tmp_path)
    assert [step.number for step in steps] == [1, 99999999, 100000000]
    assert [step.unfinished for step in steps] == [True, False, False]
    assert folders.steps_in(tmp_path / "missing") == []
