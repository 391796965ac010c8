"""``launch/examples/``: each ends well, its loss falls, and ranks train the model that one process would."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from launching import MPIRUN, SHARE_CORES, Ended, launch
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import load_adapters

import distclip as dc

pytestmark = pytest.mark.launches

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "launch/examples").glob("*.py"))
STEPS, LIMIT_S = 12, 100
LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
LLAMA |= {"num_attention_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 96}


def run(name: str, ranks: int, folder: Path, *options: str) -> tuple[Ended, list[dict[str, Any]]]:
    """Run an example, and read what it recorded."""
    mpirun = [str(MPIRUN), "-n", str(ranks), *SHARE_CORES] if ranks > 1 else []
    script = str(ROOT / f"launch/examples/{name}.py")
    ended = launch([*mpirun, sys.executable, script, *options], folder, {"HF_HUB_OFFLINE": "1"}, limit_s=LIMIT_S)
    assert ended.code == 0, ended.output
    (record,) = (folder / "runs").glob("*.jsonl")
    return ended, dc.read_records(record).steps


@functools.cache
def run_alone(name: str) -> tuple[Ended, list[dict[str, Any]], dict[str, list[tuple[int, ...]]]]:
    """The run of one process, and the shapes that it saves."""
    with tempfile.TemporaryDirectory() as folder:
        ended, steps = run(name, 1, Path(folder), f"--steps={STEPS}")
        return ended, steps, shapes(Path(folder))


def shapes(folder: Path) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of each array in all files that the ranks saved."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for file in sorted(folder.glob("runs/**/*.safetensors")):
        arrays: Any = mx.load(str(file))
        for path, array in arrays.items():
            assert mx.all(mx.isfinite(array)).item(), path
            found.setdefault(path.replace(".module.", "."), []).append(array.shape)  # fully_shard wraps modules
    return found


def validation_losses(ended: Ended) -> list[float]:
    """Those that mlx-lm's trainer prints."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", ended.output)
    return [float(loss) for loss in re.findall(r"\b\d+ +val +([\d.]+) ", text)]


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_the_loss_falls(name: str) -> None:
    ended, steps, saved = run_alone(name)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert any(step["clipped"] for step in steps)
    losses = [step["loss"] for step in steps if "loss" in step] or validation_losses(ended)
    assert losses[-1] < 0.95 * losses[0], losses
    assert "norm " in ended.output
    assert saved


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("data_parallel", 3),
        ("fully_sharded", 2),
        ("lora_mlx_lm", 2),
        ("tensor_parallel_mlx_lm", 2),
    ],
)
def test_ranks_train_as_one_process_does(name: str, ranks: int, tmp_path: Path) -> None:
    """Every step's norm is that of the whole model and of all rows, with the parameters that all steps before made."""
    ended, steps = run(name, ranks, tmp_path, f"--steps={STEPS}")
    ended_alone, steps_alone, saved_alone = run_alone(name)
    assert len(steps) == STEPS
    for step, expected in zip(steps, steps_alone, strict=True):
        for key in {"loss", "norm"} & expected.keys():
            assert step[key] == pytest.approx(expected[key], rel=2e-3), f"{key} of step {step['step']}"
    assert validation_losses(ended) == pytest.approx(validation_losses(ended_alone), rel=2e-3)
    saved = shapes(tmp_path)
    assert saved.keys() == saved_alone.keys()
    if name in ("data_parallel", "lora_mlx_lm"):
        assert saved == saved_alone
        if name == "lora_mlx_lm":
            mlx_lm_loads_the_adapters(tmp_path / "runs/lora")
    else:
        assert all(len(found) == ranks for found in saved.values()), "each rank saves its shards"
        assert 0 < values(saved) < 0.7 * values(saved_alone)


def mlx_lm_loads_the_adapters(folder: Path) -> None:
    saved: Any = mx.load(str(folder / "adapters.safetensors"))
    shape: Any = LLAMA | {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 256}
    model = load_adapters(llama.Model(llama.ModelArgs(**shape)), str(folder))
    loaded: Any = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(loaded[path], array).item() for path, array in saved.items())


def values(saved: dict[str, list[tuple[int, ...]]]) -> int:
    """How many values rank 0 holds."""
    return sum(math.prod(found[0]) for found in saved.values())


@pytest.mark.parametrize("name", ["lora_mlx_lm", "tensor_parallel_mlx_lm"])
def test_a_model_of_ones_own_takes_the_place_of_the_tiny_one(name: str, tmp_path: Path) -> None:
    save_a_model(tmp_path / "model")
    ended, steps = run(name, 1, tmp_path, "--steps=2", "--model=model")
    assert len(steps) == 2, ended.output
    sizes = {number for found in shapes(tmp_path).values() for shape in found for number in shape}
    assert 16 in sizes, "the width of the model in the folder"
    assert 48 not in sizes, "that of the example's own"


def save_a_model(folder: Path) -> None:
    """A tiny Llama with a tokenizer of characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {chr(code): number for number, code in enumerate(range(32, 127))} | {"</s>": 95}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    mx.random.seed(0)
    llama.Model(llama.ModelArgs(**LLAMA)).save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 95}))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_says_how_it_is_run(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert f"python launch/examples/{path.name}" in text.split('"""')[1]
    (page,) = (ROOT / "docs").rglob("examples.md")
    assert f"launch/examples/{path.name})" in page.read_text(), f"{page} lists every example"
