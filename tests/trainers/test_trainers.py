"""The trainers that people run, unchanged behind ``distclip run``: each with a tiny model, alone and on two ranks.

Without their packages, which `.ci/run trainers` installs into an environment of its own, all but mlx-lm are skipped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import pytest
from launching import MPIRUN, SHARE_CORES, Ended, launch

import distclip as dc
from trainers import folders

ALL = "DISTCLIP_REQUIRE_TRAINERS" in os.environ
SIZES = pytest.mark.parametrize("ranks", [0, 2], ids=["alone", "2 ranks"])
pytestmark = [pytest.mark.launches, pytest.mark.time_limit(240)]

BATCHES = ["--train", "--batch-size", "2", "--iters", "8", "--max-seq-length", "24", "--learning-rate", "5e-3"]
BATCHES += ["--num-layers", "2", "--steps-per-report", "4"]


def needs(package: str) -> None:
    if not ALL and find_spec(package) is None:
        pytest.skip(f"{package} is not installed: .ci/run trainers does that")


Makes = Callable[[str, Callable[[Path], Path]], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Makes:
    """Make a folder once, and give it again."""
    known: dict[str, Path] = {}

    def make(name: str, fill: Callable[[Path], Path]) -> Path:
        if name not in known:
            known[name] = fill(tmp_path_factory.mktemp(name))
        return known[name]

    return make


def run(folder: Path, out: Path, ranks: int, *words: str, options: tuple[str, ...] = ()) -> tuple[Ended, list[str]]:
    """Run a trainer with a threshold that clips all, and return what distclip said."""
    (out / "mac").mkdir()
    (out / "mac/sitecustomize.py").write_text(folders.LIKE_A_MAC)
    under = [str(MPIRUN), "-n", str(ranks), *SHARE_CORES] if ranks else []
    limits = ["--max-norm", "1e-3", "--record", str(out / "run.jsonl"), *options]
    command = [*under, sys.executable, "-m", "distclip", "run", *limits, *words]
    variables = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(out / "mac"), "NO_COLOR": "1"}
    ended = launch(command, folder, variables, limit_s=200)
    assert ended.code == 0, ended.output
    return ended, [line[line.index("distclip: ") :] for line in ended.output.splitlines() if "distclip: " in line]


def assert_clipped(out: Path, steps: int, ranks: int, bad: int = 0) -> None:
    record = dc.read_records(out / "run.jsonl")
    assert record.headers[0]["ranks"] == max(ranks, 1)
    assert [step["step"] for step in record.steps] == list(range(1, steps + 1))
    assert sum(step["skipped"] for step in record.steps) == bad
    assert all(step["clipped"] != step["skipped"] for step in record.steps)


def assert_quiet(told: list[str], steps: int, bad: int = 0) -> None:
    """Nothing but the steps that were skipped and the totals."""
    assert len(told) == bad + 1, told
    assert all("; the step was skipped" in line for line in told[:-1])
    assert told[-1].startswith(
        f"distclip: {steps} steps, {(steps - bad) / steps:.0%} clipped, {bad} skipped, last norm"
    )


@SIZES
@pytest.mark.parametrize(
    "kind",
    [
        "lora",
        *(
            pytest.param(kind, marks=pytest.mark.skipif(not ALL, reason="the rest: .ci/run trainers"))
            for kind in ("dora", "full")
        ),
    ],
)
def test_mlx_lm(kind: str, ranks: int, made: Makes, tmp_path: Path) -> None:
    words = ["--model", "model", "--data", "data", "--mask-prompt", *BATCHES, "--fine-tune-type", kind]
    _, told = run(
        made("lm", folders.language), tmp_path, ranks, "-m", "mlx_lm", "lora", *words, "--adapter-path", str(tmp_path)
    )
    bad = 1  # a batch that has nothing to learn
    assert_clipped(tmp_path, 8, ranks, bad)
    assert_quiet(told, 8, bad)
    weights: dict[str, mx.array] = mx.load(str(tmp_path / "adapters.safetensors"))  # type: ignore[assignment]
    assert all(mx.all(mx.isfinite(x)).item() for x in weights.values())


@SIZES
@pytest.mark.parametrize("mode", ["sft", "dpo", "orpo"])
def test_mlx_lm_lora(mode: str, ranks: int, made: Makes, tmp_path: Path) -> None:
    needs("mlx_lm_lora")
    data = "data" if mode == "sft" else "preferences"
    words = [
        "--model",
        "model",
        "--data",
        data,
        *BATCHES,
        "--train-mode",
        mode,
        "--adapter-path",
        str(tmp_path / "out"),
    ]
    _, told = run(made("lm", folders.language), tmp_path, ranks, "-m", "mlx_lm_lora.train", *words)
    assert_clipped(tmp_path, 8, ranks)
    assert_quiet(told, 8)


@SIZES
def test_mlx_embeddings_lora(ranks: int, made: Makes, tmp_path: Path) -> None:
    needs("mlx_embeddings_lora")
    words = ["--model", "model", "--data", "data", *BATCHES, "--batch-size", "4", "--adapter-path", str(tmp_path)]
    words += ["--learning-rate", "1e-4"]  # with the other the loss is 0 after two steps
    _, told = run(made("embeddings", folders.embeddings), tmp_path, ranks, "-m", "mlx_embeddings_lora.train", *words)
    assert_clipped(tmp_path, 8, ranks)
    assert_quiet(told, 8)


@SIZES
def test_mlx_vlm(ranks: int, made: Makes, tmp_path: Path) -> None:
    needs("mlx_vlm")
    words = ["--model", "model", "--data", "data", "--iters", "8", "--batch-size", str(max(ranks, 1))]
    words += ["--learning-rate", "5e-3", "--output-path", str(tmp_path)]
    _, told = run(made("vision", folders.vision), tmp_path, ranks, "-m", "mlx_vlm.train", *words)
    assert_clipped(tmp_path, 8, ranks)
    assert_quiet(told, 8)


VISION_SFT = """
import json, sys
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_vlm.utils import load_model
from mlx_vlm.trainer.vlm.sft.trainer import TrainingArgs, train
from pathlib import Path

mx.random.seed(0)
np.random.seed(0)
model = load_model(Path("model"))
model.freeze()
model.language_model.unfreeze()
rows = [
    {
        "input_ids": mx.array([[64] * 4 + list(range(i, i + 8))]),
        "attention_mask": mx.ones((1, 12), mx.int32),
        "pixel_values": mx.full((3, 16, 16), 0.1 * i),
    }
    for i in range(8)
]
limit = {"grad_clip": None} if "no-grad-clip" in sys.argv else {}
size = mx.distributed.init().size()
args = TrainingArgs(batch_size=size, iters=8, steps_per_report=4, adapter_file=sys.argv[1], **limit)
train(model, optim.AdamW(5e-3), rows, args=args)
"""


@SIZES
@pytest.mark.parametrize("limit", ["grad-clip", "no-grad-clip"])
def test_mlx_vlm_by_its_function(limit: str, ranks: int, made: Makes, tmp_path: Path) -> None:
    needs("mlx_vlm")
    (tmp_path / "sft.py").write_text(VISION_SFT)
    words = [str(tmp_path / "sft.py"), str(tmp_path / "adapters.safetensors"), limit]
    _, told = run(made("vision", folders.vision), tmp_path, ranks, *words)
    assert_clipped(tmp_path, 8, ranks)
    if limit == "grad-clip":
        assert "clips its gradients itself with mlx-vlm's grad_clip=1.0" in told.pop(0)
    assert_quiet(told, 8)


TUNE = """
import sys
import mlx.core as mx
from mlx_tune import DPOConfig, DPOTrainer, FastLanguageModel, SFTConfig, SFTTrainer

mx.random.seed({seed})
model, tokenizer = FastLanguageModel.from_pretrained("model", max_seq_length=32, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
rank = mx.distributed.init().rank()
prompts = ["A" * (i % 4 + 1) for i in range(16)]
options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=5e-3, max_steps=8)
options["output_dir"] = sys.argv[1] + str(rank)
if "{kind}" == "sft":
    data = [{{"prompt": prompt, "completion": "BCDEFGH"}} for prompt in prompts]
    args = SFTConfig(max_seq_length=32, num_layers=2, **options)
    SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=data, args=args).train()
else:
    data = [{{"prompt": prompt, "chosen": "BCDEFGH", "rejected": "BFG"}} for prompt in prompts[rank:]]
    DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=data, args=DPOConfig(**options)).train()
"""


def tune(made: Makes, out: Path, ranks: int, kind: str, seed: str = "0", options: tuple[str, ...] = ()) -> list[str]:
    needs("mlx_tune")
    (out / "tune.py").write_text(TUNE.format(kind=kind, seed=seed))
    words = [str(out / "tune.py"), str(out / "tuned")]
    _, told = run(made("lm", folders.language), out, ranks, *words, options=options)
    assert_clipped(out, 8, ranks)
    return told


@SIZES
def test_mlx_tune_sft(ranks: int, made: Makes, tmp_path: Path) -> None:
    assert_quiet(tune(made, tmp_path, ranks, "sft"), 8)


def test_mlx_tune_sft_from_different_seeds_is_said(made: Makes, tmp_path: Path) -> None:
    told = tune(made, tmp_path, 2, "sft", seed="mx.distributed.init().rank()")
    assert "at the end the parameters differ between ranks" in told[0]
    assert "though the program averages" in told[0]


@SIZES
def test_mlx_tune_dpo_is_averaged_on_request(ranks: int, made: Makes, tmp_path: Path) -> None:
    assert_quiet(tune(made, tmp_path, ranks, "dpo", options=("--average",)), 8)


def test_mlx_tune_dpo_without_an_average_is_said(made: Makes, tmp_path: Path) -> None:
    told = tune(made, tmp_path, 2, "dpo")
    assert "step averages no gradients over the 2 ranks" in told[0]
    assert "at the end the parameters differ between ranks" in told[1]
