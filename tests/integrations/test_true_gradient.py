"""check_gradient on models of mlx-lm: right where they are, and never wrong behind a router."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from reference import WORLD, line

import distclip as dc
from integrations.architectures import make


def model_of(name: str, seed: int = 0) -> Any:
    model = make(name, seed=seed)
    model.train()
    return model


def loss_fn(model: Any, tokens: mx.array) -> Any:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def check(model: Any, layout: Any, grads: Any = None) -> str:
    tokens = mx.random.randint(0, 64, (3, 13), key=mx.random.key(1))
    if grads is None:
        _, grads = nn.value_and_grad(model, loss_fn)(model, tokens)
    verdict: str = dc.check_gradient(model, loss_fn, tokens, grads, layout).verdict
    return verdict


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_model_of_mlx_lm_is_right(name: str) -> None:
    assert check(model_of(name), dc.Replicated()) == "right"


def test_a_sharded_llama_is_right() -> None:
    model = model_of("llama")
    if WORLD.size > 1:
        model.shard(WORLD.group)
        model.train()
    assert check(model, dc.layout_of(model, line())) == "right"


@pytest.mark.parametrize("seed", range(6))
def test_a_router_is_never_called_wrong(seed: int) -> None:
    assert check(model_of("qwen3_moe", seed), dc.Replicated()) in ("right", "cannot tell")


def test_a_gradient_of_bfloat16_is_right() -> None:
    model = model_of("llama")
    model.set_dtype(mx.bfloat16)
    assert check(model, dc.Replicated()) == "right"
