"""Models of mlx-lm, sharded: the norm is that of the whole model's gradient, or ``shard`` has refused the model.

Five architectures by default, all of them where ``DISTCLIP_TEST_ALL_MODELS`` is set.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from reference import WORLD, mesh, norm64, relative, wide

import distclip as dc
from distclip.integrations.shard import shard
from distclip.layout import Placement
from integrations.architectures import CANNOT, CONFIGURATIONS, WRONG, make, tokens, with_shard

SOME = ["llama", "qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3"]
TESTED = sorted(CONFIGURATIONS) if "DISTCLIP_TEST_ALL_MODELS" in os.environ else SOME
RIGHT = [name for name in TESTED if name not in WRONG]
DENSE = [name for name in ("llama", "iquestloopcoder", "ministral3", "qwen2", "qwen3") if name in TESTED]
PAGE = Path(__file__).parents[2] / "docs/how-to/tensor-parallel.md"

in_pairs = pytest.mark.skipif(WORLD.size % 2 == 1, reason="two ranks share the heads of these models")


def over_two() -> dc.Mesh:
    """Models on two ranks each: one model, or two with 4 ranks."""
    return mesh(dp=WORLD.size // 2, tp=2)


def loss_fn(model: Any, batch: mx.array) -> Any:
    return nn.losses.cross_entropy(model(batch[:, :-1]).astype(mx.float32), batch[:, 1:], reduction="mean")


def value_and_grad(model: Any, batch: mx.array) -> Any:
    model.train()
    loss, grads = nn.value_and_grad(model, loss_fn)(model, batch)
    mx.eval(loss, grads)
    return loss.item(), grads


def flat(tree: Any) -> dict[str, Any]:
    return dict(tree_flatten(tree, is_leaf=lambda node: isinstance(node, Placement)))


def my_rows(batch: mx.array) -> mx.array:
    """Those of this model: ranks along tp have the same."""
    return batch[over_two().coordinates()["dp"] :: WORLD.size // 2]


# --------------------------------------------------------------------------------------- what is tested


def test_every_architecture_that_can_be_sharded_is_tested_or_cannot_be() -> None:
    known = {*CONFIGURATIONS, *CANNOT}
    assert set(with_shard()) - known == set(), "give them a configuration in architectures.py"
    assert known - set(with_shard()) == set(), "mlx-lm has no such model to shard"


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_trained_here_still_cannot(name: str) -> None:
    configuration, error, why = CANNOT[name]
    with pytest.raises(error, match=why):
        value_and_grad(make(name, configuration), tokens())


def test_the_page_says_what_is_right_and_what_is_refused() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+)", PAGE.read_text(), re.MULTILINE)
    expected = {name: "refused" if name in WRONG else "right" for name in CONFIGURATIONS} | dict.fromkeys(CANNOT, "not")
    assert dict(rows) == expected


# ------------------------------------------------------------------------------------------ the norm


@in_pairs
@pytest.mark.parametrize("name", RIGHT)
def test_the_norm_is_that_of_the_whole_model(name: str) -> None:
    batch = tokens(4)
    model = make(name)
    loss, whole = value_and_grad(model, batch)
    layout = shard(model, over_two())
    assert any(isinstance(placement, dc.Sharded) for placement in flat(layout).values())
    mine, grads = value_and_grad(model, my_rows(batch))
    grads, norm = dc.average_and_clip(grads, math.inf, group=over_two().group("dp"), layout=layout)
    if WORLD.size == 2:
        assert mine == pytest.approx(loss, rel=1e-5)
    assert relative(norm, norm64(whole)) < 1e-5
    assert_parts_of(grads, whole, layout)


def assert_parts_of(grads: Any, whole: Any, layout: Any) -> None:
    """Each replica is the whole model's gradient; the shards of a leaf have the norm of its gradient."""
    truth, placements = flat(whole), flat(layout)
    for path, leaf in flat(grads).items():
        expected = wide(truth[path])
        size = float(np.linalg.norm(expected))
        if isinstance(placements[path], dc.Sharded):
            both = mx.distributed.all_sum(mx.square(leaf).sum(), group=over_two().group("tp")).item() ** 0.5
            assert both == pytest.approx(size, rel=1e-4), path
        else:
            assert np.linalg.norm(wide(leaf) - expected) <= 1e-4 * size, path


def with_heads(name: str, number: int) -> dict[str, Any]:
    """A configuration with so many heads of each kind."""
    configuration = dict(CONFIGURATIONS[name])
    inner = configuration.get("text_config", configuration)
    kinds = ("num_key_value_heads", "num_attention_groups", "linear_num_key_heads")
    inner = inner | {kind: number for kind in kinds if kind in inner}
    return configuration | {"text_config": inner} if "text_config" in configuration else inner


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("name", [name for name in ("llama", "qwen3_moe", *TESTED[5:]) if name not in WRONG])
def test_four_ranks_share_one_model(name: str) -> None:
    model, batch = make(name, with_heads(name, 4)), tokens(4)
    _, whole = value_and_grad(model, batch)
    layout = shard(model, mesh(tp=4))
    _, grads = value_and_grad(model, batch)
    assert relative(dc.global_norm(grads, layout=layout), norm64(whole)) < 1e-5


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3_5"])
def test_ranks_that_cannot_share_the_heads_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"heads is 2, and 4 ranks cannot share 2 heads evenly.* divides 2"):
        shard(make(name), mesh(tp=4))


@in_pairs
@pytest.mark.parametrize("name", [name for name in TESTED if name in WRONG])
def test_a_model_whose_gradient_is_wrong_is_refused_by_the_names_of_its_leaves(name: str) -> None:
    with pytest.raises(dc.LayoutError, match=r"layers\.\d+\.\S+\.weight"):
        shard(make(name), over_two())


@in_pairs
@pytest.mark.parametrize("name", DENSE)  # on a CPU experts compute in float32 alone
def test_in_bfloat16_the_layout_is_the_same_and_the_norm_within_its_rounding(name: str) -> None:
    model, wider = make(name), make(name)
    model.set_dtype(mx.bfloat16)
    _, whole = value_and_grad(model, tokens())
    layout = shard(model, over_two())
    assert flat(layout) == flat(shard(wider, over_two()))
    _, grads = value_and_grad(model, tokens())
    assert relative(dc.global_norm(grads, layout=layout), norm64(whole)) < 0.05


@in_pairs
def test_parameters_are_put_back_to_the_bit() -> None:
    model, expected = make("qwen3_moe"), make("qwen3_moe")
    shard(model, over_two())
    expected.shard(over_two().group("tp"))
    for (path, leaf), other in zip(flat(model.parameters()).items(), flat(expected.parameters()).values(), strict=True):
        assert np.array_equal(np.array(leaf), np.array(other)), path


# ------------------------------------------------------------------------------------------- training

MAX_NORM = 0.5
STEPS = 10


def optimizer_of(layout: Any, average: Any = False) -> dc.ClippedOptimizer:
    clipper = dc.Clipper(MAX_NORM, layout=layout, average=average)
    return dc.ClippedOptimizer(optim.AdamW(1e-3), clipper)


def freeze_divided(name: str, model: Any) -> None:
    """mlx-lm divides these biases by the number of ranks and adds them up, so that an optimizer moves them further."""
    if name == "gpt_oss":
        for layer in model.layers:
            layer.mlp.experts.down_proj.freeze(keys="bias")


def trained(model: Any, optimizer: Any, take: Any = lambda batch: batch) -> list[float]:
    """The loss of each step."""
    losses = []
    for step in range(STEPS):
        loss, grads = value_and_grad(model, take(tokens(4, seed=step % 2)))
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss)
    return losses


@in_pairs
@pytest.mark.parametrize("name", RIGHT)
def test_training_gives_the_losses_of_the_whole_model(name: str) -> None:
    whole, model = make(name), make(name)
    freeze_divided(name, whole)
    expected = trained(whole, optimizer_of(dc.Replicated()))
    layout = shard(model, over_two())
    freeze_divided(name, model)
    optimizer = optimizer_of(layout, average=over_two().group("dp"))
    losses = trained(model, optimizer, my_rows)
    losses = (np.array(mx.distributed.all_sum(mx.array(losses), group=WORLD.group)) / WORLD.size).tolist()
    assert optimizer.clipper.state["clipped"].item() == STEPS
    assert expected[-1] < expected[0] - 0.01
    assert losses == pytest.approx(expected, rel=1e-3)
    assert_copies_are_the_same_bits(model, layout)


def assert_copies_are_the_same_bits(model: Any, layout: Any) -> None:
    parameters = flat(model.parameters())
    for path, placement in flat(layout).items():
        group = over_two().group("dp") if isinstance(placement, dc.Sharded) else WORLD.group
        bits = parameters[path].view(mx.uint8)[None]
        assert mx.all(mx.distributed.all_gather(bits, group=group) == bits), path
