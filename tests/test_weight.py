"""Ranks that count by a weight, such as the rows of their batches: the average is that of one process with all rows."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from reference import Array, alone, normal, relative, same_bits, wide
from schemes import N, bits
from test_average import ORDER, counted

import distclip as dc

ROWS = [2, 10, 3, 7][:N] if N > 1 else [5]


def grads(rank: int, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    return {"a": normal((7, 3), (rank, 1), dtype), "b": normal((5,), (rank, 2), dtype)}


def mean64(weights: list[float], dtype: mx.Dtype = mx.float32) -> dict[str, Array]:
    total = sum(weights)
    held = [(w / total, grads(rank, dtype)) for rank, w in enumerate(weights)]
    return {name: np.sum([share * wide(tree[name]) for share, tree in held], axis=0) for name in ("a", "b")}


def near(found: dict[str, mx.array], truth: dict[str, Array], rtol: float = 1e-6, scale: float = 1.0) -> bool:
    return all(np.abs(wide(found[name]) - scale * truth[name]).max() <= rtol * scale for name in truth)


FORMS = {"a number": float, "of NumPy": np.int64, "an array": mx.array, "an array of one": lambda x: mx.array([x])}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_rank_counts_by_its_weight(form: Any, compiled: bool, world: dc.World) -> None:
    truth = mean64(ROWS)  # type: ignore[arg-type]
    norm = math.sqrt(sum(float(np.square(x).sum()) for x in truth.values()))
    clipper = dc.Clipper(0.5, average=True, check="never")
    calls: list[Any] = [
        lambda tree: (dc.average_gradients(tree, weight=form(ROWS[world.rank])), None),
        lambda tree: dc.average_and_clip(tree, 0.5, weight=form(ROWS[world.rank])),
        lambda tree: dc.average_and_clip(tree, 0.5, weight=form(ROWS[world.rank]), norm_type=2.0, bucket_bytes=0),
        lambda tree: (lambda out: (out[0], out[1].norm))(clipper(tree, weight=form(ROWS[world.rank]))),
    ]
    for i, call in enumerate(calls):
        call(grads(world.rank))  # compares trees
        run = mx.compile(call, inputs=clipper.state, outputs=clipper.state) if compiled else call
        found, seen = run(grads(world.rank))
        assert near(found, truth, scale=1.0 if i == 0 else min(1.0, 0.5 / norm))
        if seen is not None:
            assert relative(seen, norm) <= 1e-6
        assert same_bits(found)
        mx.eval(clipper.state)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
def test_small_types_do_not_overflow(dtype: mx.Dtype, world: dc.World) -> None:
    found = dc.average_gradients(grads(world.rank, dtype), weight=ROWS[world.rank])
    assert found["a"].dtype == dtype
    assert near(found, mean64(ROWS, dtype), rtol=0.05)  # type: ignore[arg-type]
    large = {"w": mx.full((3,), 6e4, dtype)}
    assert relative(dc.average_gradients(large, weight=1e6 * (1 + world.rank))["w"][0], 6e4) <= 0.02


def test_equal_weights_are_a_plain_mean_and_one_collective_more(world: dc.World, collectives: Counter[str]) -> None:
    plain = dc.average_gradients(grads(world.rank))
    found = dc.average_gradients(grads(world.rank), weight=3.0)
    assert near(found, {name: wide(x) for name, x in plain.items()})
    collectives.clear()
    _, messages = counted(collectives, lambda: dc.average_gradients(grads(world.rank), weight=3.0))
    assert messages == (2 + ORDER if N > 1 else 0)


def test_a_rank_without_rows_counts_nothing_whatever_its_gradients_are(world: dc.World) -> None:
    """Its loss is a mean of nothing: 0 / 0."""
    weights = [float(rank < max(N - 1, 1)) * (rank + 1) for rank in range(N)]
    mine = grads(world.rank)
    if weights[world.rank] == 0:
        mine = {name: x * math.nan for name, x in mine.items()}
    clipped, report = dc.Clipper(1e6, average=True)(mine, weight=weights[world.rank])
    assert report.finite.item()
    assert near(clipped, mean64(weights))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_ranks_with_different_numbers_of_rows_train_as_one_process_with_all(compiled: bool, world: dc.World) -> None:
    def trained(ranks: int) -> Any:
        mx.random.seed(5)
        model = nn.Linear(3, 1)
        clipper = dc.Clipper(0.5, average=ranks > 1, check="never", layout=dc.Replicated())
        optimizer = dc.ClippedOptimizer(optim.SGD(0.1), clipper)
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]

        def step(x: mx.array, weight: Any) -> mx.array:
            _, tree = nn.value_and_grad(model, lambda x: model(x).square().mean())(x)
            optimizer.update(model, tree, weight=weight if ranks > 1 else None)
            return optimizer.report.norm

        # Another number of rows is another shape, for which MLX traces again.
        run: Any = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
        norms = []
        for i in range(4):
            rows = [[1 + (rank + i) % 3 + 4 * rank] for rank in range(N)]
            every = [normal((n, 3), (i, rank)) for rank, (n,) in enumerate(rows)]
            x = every[world.rank] if ranks > 1 else mx.concatenate(every)
            norm = run(x, mx.array(x.shape[0]))
            mx.eval(state, norm)
            norms.append(norm.item())
        return norms, [wide(x) for x in (model.weight, model.bias)]

    for a, b in zip(
        *(np.concatenate([np.ravel(x) for x in [t[0], *t[1]]]) for t in (trained(N), trained(1))), strict=True
    ):
        assert abs(a - b) <= 1e-5 * max(1, abs(b))


def test_bad_steps_are_skipped_with_weights_too(world: dc.World) -> None:
    clipper = dc.Clipper(1.0, average=True, check="never")
    clipper(grads(world.rank), weight=ROWS[world.rank])
    bad = grads(world.rank)
    if world.rank == N - 1:
        bad["a"][0, 0] = math.nan
    clipped, report = clipper(bad, weight=ROWS[world.rank])
    assert report.skipped.item()
    assert bits(clipped) == bits({name: mx.zeros_like(x) for name, x in clipped.items()})


@alone
def test_a_wrong_weight_is_said_so() -> None:
    wrong: Any
    for wrong, kind in ((-1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("3", TypeError)):
        for call in (dc.average_gradients, partial(dc.average_and_clip, max_norm=1.0), dc.Clipper(average=True)):
            with pytest.raises(kind, match=r"^weight (should be|is )"):
                call(grads(0), weight=wrong)
    with pytest.raises(ValueError, match="make the Clipper with average=True"):
        dc.Clipper()(grads(0), weight=1.0)
