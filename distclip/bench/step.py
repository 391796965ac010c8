"""The share of a training step that clipping takes, and the memory that a norm and a clip need."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from distclip.average import average_and_clip
from distclip.bench.timing import Contestant, Result, Series, Work, interleave, work_of
from distclip.bench.trees import Grads
from distclip.clip import clip_grad_norm

DIMS, HEADS, LAYERS, BATCH, CONTEXT, MAX_NORM = 64, 4, 2, 16, 64, 0.5  # as in launch/train.py

Clip = Callable[[Any], tuple[Any, Any]]


class ByteTransformer(nn.Module):
    """A language model of bytes, as small as that of launch/train.py."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, DIMS)
        self.blocks = nn.TransformerEncoder(LAYERS, DIMS, HEADS, 4 * DIMS, activation=nn.gelu_approx)
        self.head = nn.Linear(DIMS, 256, bias=False)
        self.mask = nn.MultiHeadAttention.create_additive_causal_mask(CONTEXT)
        self.freeze(keys="mask", recurse=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.head(self.blocks(self.embedding(tokens), self.mask))


def training_step(rounds: int) -> Result:
    """Time forward, backward and AdamW's update with distclip's clip, MLX's and none, and distclip's clip alone."""
    mx.random.seed(0)
    model, optimizer = ByteTransformer(), optim.AdamW(3e-3, weight_decay=0.01)
    optimizer.init(model.trainable_parameters())
    loss_and_grad = nn.value_and_grad(model, _loss)

    def gradient() -> Any:
        loss, grads = loss_and_grad(model, mx.random.randint(0, 256, (BATCH, CONTEXT + 1)))
        mx.eval(loss, grads)
        return grads

    def step_with(clip: Clip) -> Work:
        def work(_: list[Any]) -> tuple[Any, Any]:
            grads, norm = clip(gradient())
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state, norm)
            return None, None

        return work

    def clip(grads: Any) -> tuple[Any, Any]:
        return average_and_clip(grads, MAX_NORM)

    contestants = [
        Contestant("distclip", lambda: None, step_with(clip)),
        Contestant("MLX", lambda: None, step_with(lambda grads: optim.clip_grad_norm(grads, MAX_NORM))),
        Contestant("no clipping", lambda: None, step_with(lambda grads: (grads, None)), floor=True),
        Contestant("distclip's clip alone", gradient, work_of(clip), floor=True),
    ]
    series = interleave(contestants, rounds, truth=None)
    leaves: Any = tree_flatten(model.trainable_parameters())
    return Result(
        part="step",
        case="training step",
        tree=f"byte-level transformer, {len(leaves)} leaves",
        dtype="float32",
        bytes=sum(leaf.nbytes for _, leaf in leaves),
        values=sum(leaf.size for _, leaf in leaves),
        series=series,
        shares=_shares(*series),
    )


def _loss(model: ByteTransformer, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def _shares(ours: Series, mlx: Series, without: Series, alone: Series) -> dict[str, float]:
    """What part of the step the clip takes, by the difference to a step without it, and by itself."""

    def added(series: Series) -> float:
        return median(a - b for a, b in zip(series.seconds, without.seconds, strict=True)) / without.median

    return {
        "distclip, with minus without": added(ours),
        "MLX, with minus without": added(mlx),
        "distclip, clip alone": alone.median / ours.median,
    }


# --------------------------------------------------------------------------------------------------- memory


def memory(grads: Grads) -> dict[str, dict[str, float]]:
    """The peak of MLX's memory above the gradients, relative to their size, by case and library."""

    max_norm = grads.norm / 2
    libraries = {"distclip": clip_grad_norm, "MLX": optim.clip_grad_norm}
    cases: dict[str, Any] = {
        "norm": lambda clip, box: clip(box[0], math.inf)[1],
        "clip, given up": lambda clip, box: clip(box.pop(), max_norm),
        "clip, kept": lambda clip, box: clip(box[0], max_norm),
    }
    return {case: {name: _peak(work, clip, grads) for name, clip in libraries.items()} for case, work in cases.items()}


def _peak(work: Callable[[Any, list[Any]], Any], clip: Any, grads: Grads) -> float:
    box = [grads.fresh_mlx()]
    mx.clear_cache()
    before: int = mx.get_active_memory()
    mx.reset_peak_memory()
    results = work(clip, box)
    mx.eval(results)
    del results
    peak: int = mx.get_peak_memory()
    return (peak - before) / grads.bytes
