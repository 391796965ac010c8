"""LoRA of sharded models, in both orders: the whole model's outputs and gradient, and its adapters when it is saved."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from reference import WORLD, norm64, relative

import distclip as dc
from distclip.integrations.shard import shard
from distclip.integrations.whole import sharding_of
from integrations.architectures import CONFIGURATIONS, WRONG, make, tokens
from integrations.test_shard import flat, in_pairs, loss_fn, my_rows, over_two, value_and_grad

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 16}
ORDERS = ("before", "after")
TESTED = [("llama", False, order) for order in ORDERS]
TESTED += [("qwen3_moe", False, "after"), ("qwen3_moe", True, "before"), ("qwen3_5", False, "before")]
if "DISTCLIP_TEST_ALL_MODELS" in os.environ:
    TESTED = [(name, False, order) for name in CONFIGURATIONS if name not in WRONG for order in ORDERS]
    TESTED += [(name, True, order) for name in ("llama", "qwen3", "qwen3_moe") for order in ORDERS]


def base(name: str, quantized: bool = False) -> Any:
    """Frozen, as for LoRA; quantized ones are wide enough for their blocks of 32."""
    configuration = CONFIGURATIONS[name]
    if quantized:
        configuration = configuration | {key: value for key, value in WIDE.items() if key in configuration}
    model = make(name, configuration)
    if quantized:
        nn.quantize(model, group_size=32, bits=8)
    model.freeze()
    return model


def add_lora(model: Any, seed: int = 5) -> None:
    mx.random.seed(seed)
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})


def values(model: Any) -> dict[str, mx.array]:
    """Of the LoRA of a whole model; lora_b, which is zero at its start, has some."""
    parameters: Any = tree_flatten(model.trainable_parameters())
    filled = {}
    for number, (path, leaf) in enumerate(parameters):
        filled[path] = leaf + 0.1 * mx.random.normal(leaf.shape, key=mx.random.key(number))
    return filled


def fill(model: Any, whole: dict[str, mx.array]) -> None:
    """Give a model this rank's part of values."""
    sharding = sharding_of(model)
    filled = []
    for path, leaf in whole.items():
        mine = sharding.positions.get(path) if sharding else None
        placement: Any = flat(sharding.layout)[path] if sharding else None
        filled.append((path, leaf if mine is None else mx.take(leaf, mx.array(mine), axis=placement.dim)))
    model.update(tree_unflatten(filled))


def whole_and_sharded(name: str, order: str, quantized: bool = False) -> tuple[Any, Any, Any, dict[str, mx.array]]:
    whole, model = base(name, quantized), base(name, quantized)
    add_lora(whole)
    given = values(whole)
    fill(whole, given)
    if order == "before":
        add_lora(model)
        fill(model, given)
    layout = shard(model, over_two())
    if order == "after":
        add_lora(model, seed=5 if WORLD.rank == 0 else 6 + WORLD.rank)
        fill(model, given)
    return whole, model, layout, given


@in_pairs
@pytest.mark.parametrize(("name", "quantized", "order"), TESTED)
def test_outputs_and_gradient_are_those_of_the_whole_model(name: str, quantized: bool, order: str) -> None:
    whole, model, layout, given = whole_and_sharded(name, order, quantized)
    batch = tokens(4)
    assert mx.allclose(model(batch), whole(batch), rtol=1e-4, atol=1e-4)
    _, truth = value_and_grad(whole, batch)
    _, grads = value_and_grad(model, my_rows(batch))
    assert set(flat(grads)) == set(given), "all else is frozen"
    grads = dc.average_gradients(grads, group=over_two().group("dp"))
    assert relative(dc.global_norm(grads, layout=layout), norm64(truth)) < 1e-5
    assert dc.check_gradient(model, loss_fn, my_rows(batch), grads, layout).verdict == "right"
    sharding: Any = sharding_of(model)
    for path, leaf in sharding.whole(flat(model.trainable_parameters())).items():
        assert mx.array_equal(leaf, given[path]), path
