"""check_gradient on models of mlx-lm: right where they are, and never wrong behind a router."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map_with_path
from reference import WORLD, line

import distclip as dc

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 64}
QWEN: dict[str, Any] = {"max_position_embeddings": 128, "head_dim": 8, "rope_theta": 1e4, "tie_word_embeddings": False}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [0]}
MOE |= {"moe_intermediate_size": 32, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {"llama": SMALL, "qwen3": SMALL | QWEN, "qwen3_moe": SMALL | QWEN | MOE}


def make(name: str, seed: int = 0) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(MODELS[name] | {"model_type": name}))
    mx.random.seed(seed)

    def fill(path: str, leaf: mx.array) -> mx.array:
        noise = mx.random.normal(leaf.shape)
        return 1 + 0.3 * noise if "norm" in path else 0.25 * noise

    model.update(tree_map_with_path(fill, model.parameters()))
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
    assert check(make(name), dc.Replicated()) == "right"


def test_a_sharded_llama_is_right() -> None:
    model = make("llama")
    if WORLD.size > 1:
        model.shard(WORLD.group)
        model.train()
    assert check(model, dc.layout_of(model, line())) == "right"


@pytest.mark.parametrize("seed", range(6))
def test_a_router_is_never_called_wrong(seed: int) -> None:
    assert check(make("qwen3_moe", seed), dc.Replicated()) in ("right", "cannot tell")


def test_a_gradient_of_bfloat16_is_right() -> None:
    model = make("llama")
    model.set_dtype(mx.bfloat16)
    assert check(model, dc.Replicated()) == "right"
