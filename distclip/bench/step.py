"""The share of a whole training step that clipping takes, and the memory that a norm and a clip need."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

import distclip
from distclip.bench.timing import Contestant, Result, interleave
from distclip.bench.trees import Grads

Step = Callable[[list[Any]], tuple[Any, Any]]


def training_step(rounds: int) -> Result:
    """The step of ``launch/train.py`` with its default options, with and without the line that clips.

    Raises:
        ImportError: the script, or the text it trains on, is not there.
    """
    train = _script()
    args = train.parse([])
    mx.random.seed(args.seed)
    model = train.ByteLM(args.dims, args.heads, args.layers)
    optimizer = optim.AdamW(args.learning_rate, weight_decay=0.01)
    optimizer.init(model.trainable_parameters())
    text, numbers = train.Text(args.data, args.context, args.seed), count()
    loss_and_grad = nn.value_and_grad(model, train.loss_fn)
    leaves: Any = tree_flatten(model.trainable_parameters())

    def gradient() -> Any:
        loss, grads = loss_and_grad(model, text.batch("train", args.batch_size, next(numbers), 0, 1))
        mx.eval(loss, grads)
        return grads

    def step(clip: Callable[[Any], tuple[Any, Any]]) -> Step:
        def work(_: list[Any]) -> tuple[Any, Any]:
            grads, norm = clip(gradient())
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state, norm)
            return None, None

        return work

    def clip(grads: Any) -> tuple[Any, Any]:
        return distclip.average_and_clip(grads, args.max_norm)

    def clip_alone(box: list[Any]) -> tuple[Any, Any]:
        grads, norm = clip(box.pop())
        mx.eval(grads, norm)
        return grads, None

    series = interleave(
        [
            Contestant("distclip", lambda: None, step(clip)),
            Contestant("MLX", lambda: None, step(lambda grads: optim.clip_grad_norm(grads, args.max_norm))),
            Contestant("no clipping", lambda: None, step(lambda grads: (grads, None)), floor=True),
            Contestant("distclip's clip alone", gradient, clip_alone, floor=True),
        ],
        rounds,
        None,
    )
    ours, mlx, without, alone = series
    shares = {
        f"{name}, with minus without": median(a - b for a, b in zip(one.seconds, without.seconds, strict=True))
        / without.median
        for name, one in (("distclip", ours), ("MLX", mlx))
    }
    shares["distclip, clip alone"] = alone.median / ours.median
    tree = f"launch/train.py, {len(leaves)} leaves"
    size, values = sum(x.nbytes for _, x in leaves), sum(x.size for _, x in leaves)
    return Result("step", "training step", tree, args.dtype, size, values, series, shares)


def _script() -> ModuleType:
    path = Path(distclip.__file__).parents[1] / "launch" / "train.py"
    spec = importlib.util.spec_from_file_location("distclip_launch_train", path)
    if not path.exists() or spec is None or spec.loader is None:
        raise ImportError("launch/train.py comes with a checkout of distclip, not with an installed one")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------------------------- memory


def memory(grads: Grads) -> dict[str, dict[str, float]]:
    """The peak of MLX's memory above the gradients, as a part of their size, by case and contestant."""

    def norm(way: Any) -> Step:
        return lambda box: (None, way(box[0], math.inf)[1])

    def clip(way: Any) -> Step:
        return lambda box: way(box.pop(), grads.norm / 2)

    def kept(way: Any) -> Step:
        return lambda box: way(box[0], grads.norm / 2)

    ways = {"distclip": distclip.clip_grad_norm, "MLX": optim.clip_grad_norm}
    return {
        case: {name: _peak(make(way), grads) for name, way in ways.items()}
        for case, make in (("norm", norm), ("clip, given up", clip), ("clip, kept", kept))
    }


def _peak(work: Step, grads: Grads) -> float:
    box = [grads.fresh_mlx()]
    mx.clear_cache()
    before: int = mx.get_active_memory()
    mx.reset_peak_memory()
    results = work(box)
    mx.eval(results)
    del results
    peak: int = mx.get_peak_memory()
    return (peak - before) / grads.bytes
