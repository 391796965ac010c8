"""``launch/train.py`` and ``launch/checkpoints.py``: the same run on every layout, whole checkpoints, live output."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from launching import MPIRUN, SHARE_CORES, Ended, environment, launch, on_terminal, under_mpirun

import distclip as dc

pytestmark = pytest.mark.launches

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "launch/train.py")
SMALL = {"context": 32, "batch-size": 8, "steps": 24, "valid-every": 12, "checkpoint-every": 0, "warm-up": 5}
LIMIT_S = 100


def train(ranks: int, folder: Path, **options: Any) -> tuple[Ended, list[dict[str, float]]]:
    """Run the script and read its record of every step."""
    return run(command_of(ranks, record="run.jsonl", **options), folder)


def train_apart(folders: list[Path], **options: Any) -> tuple[Ended, list[dict[str, float]]]:
    """The same with a folder for each rank, as on hosts that share no disk."""
    (folders[0] / "run.jsonl").unlink(missing_ok=True)
    alone = command_of(1, record="run.jsonl", **options)
    command = [str(MPIRUN), *SHARE_CORES]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        command += ["-n", "1", "--wdir", str(folder), *alone, ":"]
    return run(command[:-1] if len(folders) > 1 else alone, folders[0])


def run(command: list[str], folder: Path) -> tuple[Ended, list[dict[str, float]]]:
    ended = launch(command, folder, limit_s=LIMIT_S)
    record = folder / "run.jsonl"
    steps = dc.read_records(record).steps if record.exists() else []
    return ended, [{name: step[name] for name in ("step", "loss", "norm", "valid") if name in step} for step in steps]


def command_of(ranks: int, **options: Any) -> list[str]:
    merged = SMALL | {name.replace("_", "-"): value for name, value in options.items()}
    arguments = [f"--{name}" if value is True else f"--{name}={value}" for name, value in merged.items()]
    mpirun = [str(MPIRUN), "-n", str(ranks), *SHARE_CORES] if ranks > 1 else []
    return [*mpirun, sys.executable, TRAIN, *arguments]


@pytest.fixture(scope="module")
def steps_alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    ended, steps = train(1, tmp_path_factory.mktemp("alone"))
    assert ended.code == 0, ended.output
    assert sum(step["norm"] > 0.5 for step in steps) > 10, "clipping was to be active"
    return steps


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(4, "dp"), (2, "tp"), (4, "tp"), (2, "fsdp"), (4, "fsdp"), (4, "dp+tp")],
)
def test_every_layout_makes_the_same_run(
    ranks: int, parallel: str, steps_alone: list[dict[str, float]], tmp_path: Path
) -> None:
    ended, steps = train(ranks, tmp_path, parallel=parallel, check_gradient=True)
    assert ended.code == 0, ended.output
    assert re.search(r"^all +the gradient .* (0\.99|1\.00)\d\d .* right$", ended.output, re.MULTILINE), ended.output
    assert len(steps) == len(steps_alone) == 24
    for expected, step in zip(steps_alone, steps, strict=True):
        assert step.keys() == expected.keys()
        for name in expected:
            assert step[name] == pytest.approx(expected[name], rel=1e-3), f"{name} at step {expected['step']}"


def test_clipping_rescues_a_run_that_diverges(tmp_path: Path) -> None:
    options = {"optimizer": "sgd", "learning-rate": 1, "warm-up": 20, "valid-every": 10, "steps": 40}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ended, unclipped = train(1, tmp_path / "a", max_norm=0, **options)
    assert ended.code == 0, ended.output
    ended, clipped = train(1, tmp_path / "b", max_norm=0.5, **options)
    assert ended.code == 0, ended.output
    assert not max(step["loss"] for step in unclipped) <= 2 * unclipped[0]["loss"]  # NaN is divergence too
    valid = [step["valid"] for step in clipped if "valid" in step]
    assert valid[-1] < valid[0]
    assert valid[-1] < 0.6 * clipped[0]["loss"]


@pytest.mark.parametrize(("ranks", "parallel"), [(1, "dp"), (3, "dp"), (2, "fsdp"), (4, "dp+tp")])
def test_a_resumed_run_ends_in_the_same_bits(ranks: int, parallel: str, tmp_path: Path) -> None:
    """Each rank has a disk of its own, and the newest checkpoint is missing on the last of them."""
    folders = [tmp_path / str(rank) for rank in range(ranks)]
    options = {"parallel": parallel, "steps": 8, "checkpoint-every": 4, "batch-size": 12, "checkpoint": "ck"}
    whole, steps = train_apart(folders, **options)
    assert whole.code == 0, whole.output
    shards = {path.relative_to(tmp_path): arrays(path) for path in tmp_path.glob("*/ck/step-00000008/shard-*")}
    assert len(shards) == {"dp": 1, "fsdp": 2, "dp+tp": 2}[parallel], "replicas were written"
    writers = [folder for folder in folders if (folder / "ck").exists()]
    shutil.rmtree(writers[-1] / "ck/step-00000008")
    if ranks == 3:  # the hosts come in another order
        (folders[0] / "ck").rename(folders[1] / "ck")
    resumed, more = train_apart(folders, resume=True, **options)
    assert resumed.code == 0, resumed.output
    assert more == steps[4:]
    for path, before in shards.items():
        after = arrays(tmp_path / path)
        assert after.keys() == before.keys()
        assert all(mx.array_equal(before[name], after[name], equal_nan=True).item() for name in before)
    if parallel == "fsdp":
        shutil.rmtree(folders[1] / "ck")
        refused, _ = train_apart(folders, resume=True, **options)
        assert refused.code != 0
        assert re.search(rf"rank 0 on \S+, in {folders[0]}/ck: shard-0.safetensors of steps 4, 8\n", refused.output)
        assert re.search(rf"rank 1 on \S+, in {folders[1]}/ck: shard-1.safetensors of steps none\n", refused.output)
        assert refused.output.count("no step is whole over all ranks") == 1


def arrays(path: Path) -> dict[str, mx.array]:
    loaded: Any = mx.load(str(path))
    mx.eval(loaded)
    return dict(loaded)


def test_a_checkpoint_brings_back_bits_and_random_numbers(tmp_path: Path) -> None:
    """Two dp ranks draw different random numbers. Rank 0 alone has the file, under the name of an unfinished step."""
    program = f"""
    import os, sys
    import distclip as dc
    import mlx.core as mx
    import mlx.optimizers as optim

    world = dc.init()
    os.makedirs(f"disk-{{world.rank}}")
    os.chdir(f"disk-{{world.rank}}")
    sys.path.insert(0, {str(ROOT / "launch")!r})
    from checkpoints import Checkpoints, flatten
    from train import ByteLM

    bits = {{"a": [0x7FC00001, 0x80000000, 0xFF800000, 1], "b": [3]}}

    def make(seed):
        mx.random.seed(seed)
        model = ByteLM(8, 1, 1)
        model.odd = {{name: mx.array(words, mx.uint32).view(mx.float32) for name, words in bits.items()}}
        model.scalars = [mx.array(-0.0, mx.bfloat16), mx.array(True), mx.array(2**40 + 1, mx.int64)]
        optimizer = dc.ClippedOptimizer(optim.AdamW(1e-3), dc.Clipper(dc.AutoClip()))
        optimizer.init(model.trainable_parameters())
        return model, optimizer, Checkpoints("ck", world, dc.Mesh(dp=2, fsdp=1, tp=1), {{"parallel": "dp"}})

    model, optimizer, checkpoints = make(0)
    mx.random.seed(world.rank)
    checkpoints.save(3, model, optimizer)
    drawn = mx.random.normal((4,)).tolist()
    if world.rank == 0:  # killed after all ranks had written, before it renamed its folder
        os.rename("ck/step-00000003", "ck/.step-00000003")
        os.makedirs("../disk-1/ck/step-00000003")
        os.link("ck/.step-00000003/checkpoint.json", "../disk-1/ck/step-00000003/checkpoint.json")
    mx.eval(mx.distributed.all_sum(mx.ones(1), group=world.group))

    loaded, its_optimizer, checkpoints = make(1)
    assert checkpoints.load(loaded, its_optimizer) == 3
    assert mx.random.normal((4,)).tolist() == drawn
    for name, words in bits.items():
        assert loaded.odd[name].view(mx.uint32).tolist() == words, loaded.odd[name].view(mx.uint32)
    assert [x.dtype for x in loaded.scalars] == [mx.bfloat16, mx.bool_, mx.int64]
    assert loaded.scalars[0].view(mx.uint16).item() == 0x8000
    assert [x.item() for x in loaded.scalars[1:]] == [True, 2**40 + 1]
    before, after = flatten(model, optimizer), flatten(loaded, its_optimizer)
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name], equal_nan=True).item() for name in before)
    """
    ended = under_mpirun(2, program, tmp_path)
    assert ended.code == 0, ended.output


def test_a_full_disk_ends_the_run_and_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    """Rank 1's disk of 1 MiB has room for one of its files, which have 0.8 MB each."""
    folders = [tmp_path / "0", tmp_path / "1"]
    folders[1].mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folders[1])]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, timeout=10).returncode:
        pytest.skip("a small disk cannot be made here")
    try:
        ended, _ = train_apart(folders, parallel="fsdp", steps=6, checkpoint="ck", checkpoint_every=2)
        left = [sorted(path.name for path in (folder / "ck").iterdir()) for folder in folders]
    finally:
        subprocess.run(["umount", str(folders[1])], check=True, timeout=10)
    assert ended.code != 0
    message = (
        rf"rank 1 of 2 on \S+ cannot write the checkpoint of step 4 to {folders[1]}/ck: .* bytes, and [\d,]+ are free"
    )
    assert re.search(message, ended.output), ended.output
    assert left == [["step-00000002"], ["step-00000002"]]


@pytest.mark.parametrize(("ranks", "parallel"), [(1, "dp"), (2, "fsdp")])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(ranks: int, parallel: str, tmp_path: Path) -> None:
    options = {"parallel": parallel, "checkpoint-every": 1, "checkpoint": "ck", "valid-every": 1000}
    for extra_s in (0.0, 0.13, 0.31):
        command = command_of(ranks, steps=100000, **options, **({"resume": True} if extra_s else {}))
        before = newest(tmp_path / "ck")
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + LIMIT_S
        while newest(tmp_path / "ck") <= before + 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(extra_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        time.sleep(1)  # the ranks notice that mpirun has ended
        assert newest(tmp_path / "ck") > before
    last = newest(tmp_path / "ck")
    ended, _ = train(ranks, tmp_path, steps=last + 2, resume=True, allow_changed=True, **options)
    assert ended.code == 0, ended.output
    assert newest(tmp_path / "ck") == last + 2
    assert len(list((tmp_path / "ck").glob("step-*"))) == 2, "older checkpoints are removed"


def newest(folder: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("step-*")), default=0)


def test_the_loss_falls_in_bfloat16(tmp_path: Path) -> None:
    ended, steps = train(2, tmp_path, dtype="bfloat16")
    assert ended.code == 0, ended.output
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    runs = []
    for ranks, parallel in ((1, "dp"), (4, "dp+tp")):
        folder = tmp_path / parallel
        folder.mkdir()
        runs.append(train(ranks, folder, steps=8, accumulate=3, parallel=parallel)[1])
    for alone, parallel_step in zip(*runs, strict=True):
        assert parallel_step["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert parallel_step["norm"] == pytest.approx(alone["norm"], rel=1e-3)
    assert runs[0][-1]["loss"] < 0.8 * runs[0][0]["loss"]


def test_it_reads_another_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the same words again and again. " * 200)
    ended, steps = train(1, tmp_path, data="text", steps=30)
    assert ended.code == 0, ended.output
    assert steps[-1]["loss"] < 2.5


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (3, {}, "--batch-size 8 cannot be divided among the 3 ranks"),
        (3, {"parallel": "dp+tp"}, "--parallel dp+tp needs an even number of ranks, not 3"),
        (3, {"parallel": "tp"}, "--heads 4 cannot be divided among 3 tp ranks"),
        (1, {"watchdog": -1}, "timeout should be seconds, > 0 and finite, -1.0 was provided"),
        (1, {"steps": 0}, "--steps must be at least 1"),
        (1, {"dims": 60, "heads": 8}, "--dims 60 must be a multiple of 2 x --heads 8"),
        (1, {"max-norm": -1}, "--max-norm -1 must be at least 0"),
        (1, {"data": "missing.txt"}, "missing.txt"),
    ],
)
def test_a_mistake_gets_one_clear_error(ranks: int, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    ended, _ = train(ranks, tmp_path, **({"steps": 2} | options))
    assert ended.code != 0
    assert message in ended.output


def test_another_model_does_not_load_a_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 2, "checkpoint": "ck", "checkpoint-every": 1}
    assert train(1, tmp_path, **options)[0].code == 0
    for other in ({"layers": 3}, {"dims": 32}, {"optimizer": "sgd"}, {"dtype": "bfloat16"}):
        ended, _ = train(1, tmp_path, resume=True, **options, **other)
        assert ended.code != 0
        assert f"was written with {next(iter(other))} = " in ended.output
    ended, _ = train(2, tmp_path, resume=True, allow_changed=True, **options, layers=3)
    assert ended.code != 0
    assert ended.output.count("does not hold the arrays that this model and this optimizer have") == 1
    ended, _ = train(1, tmp_path, resume=True, **options)
    assert ended.code == 0
    assert "nothing to do: the checkpoint has seen 2 steps" in ended.output
    assert train(1, tmp_path, **options | {"checkpoint": "other"})[0].code == 0
    shutil.rmtree(tmp_path / "ck/step-00000001")
    (tmp_path / "other/step-00000001").rename(tmp_path / "ck/step-00000001")
    ended, _ = train(1, tmp_path, resume=True, **options)
    assert ended.code != 0
    assert "are of different runs" in ended.output


def test_a_fresh_run_keeps_the_checkpoints_of_an_earlier_one(tmp_path: Path) -> None:
    """Both ranks write to one disk; where there is nothing to resume, a run begins, and another layout is refused."""
    options = {"parallel": "fsdp", "checkpoint": "ck", "checkpoint_every": 1}
    first, _ = train(2, tmp_path, steps=4, resume=True, **options)
    assert first.code == 0, first.output
    assert first.output.count("--resume: no rank has a checkpoint in") == 1
    (tmp_path / "ck/.step-00000005").mkdir()  # cut off
    assert train(2, tmp_path, steps=2, **options)[0].code == 0
    for folder, steps in (("ck/earlier-1", (3, 4)), ("ck", (1, 2))):
        assert sorted(path.name for path in (tmp_path / folder).glob("step-*")) == [f"step-{n:08d}" for n in steps]
    assert sorted(path.name for path in (tmp_path / "ck").iterdir()) == ["earlier-1", "step-00000001", "step-00000002"]
    other, _ = train(2, tmp_path, steps=3, resume=True, **options | {"parallel": "tp"})
    assert other.code != 0
    assert other.output.count("was written with parallel = fsdp, and this run has tp") == 1, other.output


def test_a_loader_that_hangs_is_ended(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "text")
    ended, _ = train(1, tmp_path, data="text", watchdog=1)
    assert ended.code == 1
    assert re.search(r"rank 0 of 1 on \S+: no step has ended for 1 s; it is the first\.", ended.output), ended.output


def test_a_run_may_start_without_warm_up(tmp_path: Path) -> None:
    ended, steps = train(1, tmp_path, steps=10, warm_up=0)
    assert ended.code == 0, ended.output
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_a_terminal_sees_a_bar_and_a_file_sees_lines(tmp_path: Path) -> None:
    ended, _ = train(1, tmp_path, steps=4, log_every=2)
    lines = ended.output.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 3/4", "step 4/4"]
    assert all(word in lines[-1] for word in ("loss", "valid", "norm", "clipped", " ms"))

    shown = on_terminal(command_of(1, steps=4), tmp_path, limit_s=LIMIT_S)
    assert b"\r[##########] step 4/4  loss " in shown
    assert shown.count(b"\r[") >= 2


def test_the_script_runs_in_any_folder_without_a_record(tmp_path: Path) -> None:
    """It finds checkpoints.py beside itself, and writes nothing but checkpoints."""
    ended = launch(command_of(2, steps=2, checkpoint_every=1), tmp_path, limit_s=LIMIT_S)
    assert ended.code == 0, ended.output
    assert ended.output.count("step 2/2") == 1
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")) == ["runs/train"]
