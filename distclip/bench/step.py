"""The share of a training step that clipping takes, and the memory that a norm and a clip need."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from distclip.average import average_and_clip
from distclip.bench.timing import Contestant, Function, Result, Series, interleave, work_of
from distclip.bench.trees import Grads
from distclip.clip import clip_grad_norm

DIMS, HEADS, LAYERS, BATCH, CONTEXT, MAX_NORM = 64, 4, 2, 16, 64, 0.5  # as in launch/train.py


class ByteTransformer(nn.Module):
    """A language model of bytes, as small as that of launch/train.py."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, DIMS)
        self.blocks = nn.TransformerEncoder(LAYERS, DIMS, HEADS, 4 * DIMS, activation=nn.gelu_approx)
        self.head = nn.Linear(DIMS, 256, bias=False)
        self._mask = nn.MultiHeadAttention.create_additive_causal_mask(CONTEXT)  # with its "_" it is no parameter

    def loss(self, tokens: mx.array) -> mx.array:
        logits = self.head(self.blocks(self.embedding(tokens[:, :-1]), self._mask))
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")


def training_step(rounds: int) -> Result:
    """Time forward, backward and AdamW's update with distclip's clip, MLX's and none, and distclip's clip alone."""
    mx.random.seed(0)
    model, optimizer = ByteTransformer(), optim.AdamW(3e-3, weight_decay=0.01)
    optimizer.init(model.trainable_parameters())
    loss_and_grad = nn.value_and_grad(model, model.loss)

    def gradient() -> Any:
        loss, grads = loss_and_grad(mx.random.randint(0, 256, (BATCH, CONTEXT + 1)))
        mx.eval(loss, grads)
        return grads

    def step_with(name: str, clip: Function, floor: bool = False) -> Contestant:
        def work(_: list[Any]) -> tuple[Any, Any]:
            grads, norm = clip(gradient())
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state, norm)
            return None, None

        return Contestant(name, lambda: None, work, floor)

    clip = partial(average_and_clip, max_norm=MAX_NORM)
    contestants = [
        step_with("distclip", clip),
        step_with("MLX", partial(optim.clip_grad_norm, max_norm=MAX_NORM)),
        step_with("no clipping", lambda grads: (grads, None), floor=True),
        Contestant("distclip's clip alone", gradient, work_of(clip), floor=True),
    ]
    ours, mlx, without, alone = series = interleave(contestants, rounds)
    leaves: Any = tree_flatten(model.trainable_parameters())
    values = sum(leaf.size for _, leaf in leaves)
    shares = {
        "distclip, with minus without": _share_added(ours, without),
        "MLX, with minus without": _share_added(mlx, without),
        "distclip, clip alone": alone.median / ours.median,
    }
    tree = f"byte-level transformer, {len(leaves)} leaves"
    return Result("step", "training step", tree, "float32", 4 * values, values, series, shares)


def _share_added(series: Series, without: Series) -> float:
    return float(median(map(operator.sub, series.seconds, without.seconds)) / without.median)


def memory(grads: Grads) -> dict[str, dict[str, float]]:
    """The peak of MLX's memory above the gradients, relative to their size, by case and library."""
    max_norm = grads.norm / 2
    libraries = {"distclip": clip_grad_norm, "MLX": optim.clip_grad_norm}
    cases: dict[str, Any] = {
        "norm": lambda clip, box: clip(box[0], math.inf)[1],
        "clip, given up": lambda clip, box: clip(box.pop(), max_norm),
        "clip, kept": lambda clip, box: clip(box[0], max_norm),
    }
    return {
        case: {name: peak_of(partial(work, clip), grads) for name, clip in libraries.items()}
        for case, work in cases.items()
    }


def peak_of(work: Callable[[list[Any]], Any], grads: Grads) -> float:
    """The peak of MLX's memory above the gradients, relative to their size.

    Args:
        work: a function of a list that alone holds them.
    """
    box = [grads.fresh_mlx()]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work(box))
    return float((mx.get_peak_memory() - before) / grads.bytes)
