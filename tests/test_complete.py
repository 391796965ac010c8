"""Leaves that are partial over mesh axes: every function sums them first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from reference import (
    WORLD,
    assert_close,
    leaves,
    line,
    mesh,
    norm64,
    normal,
    relative,
    same_bits,
    several,
    square,
    wide,
)

import distclip as dc

N = WORLD.size
AXIS = "x"  # of all ranks
LAYOUT = {"shard": dc.Sharded(AXIS), "replica": dc.Replicated(), "partial": [dc.Partial(AXIS), dc.Partial(AXIS)]}

pytestmark = several


def held(rank: int = WORLD.rank, dtype: mx.Dtype = mx.float32) -> dict[str, Any]:
    """What a rank holds."""
    return {
        "shard": normal((4, 3), (rank, 1)),
        "replica": normal((5,), (99, 2)),
        "partial": [normal((6, 2), (rank, 3), dtype), normal((), (rank, 4))],
    }


def truth() -> dict[str, Any]:
    """What it holds once the contributions are added up, in float64."""
    contributions = [[wide(x) for x in held(rank)["partial"]] for rank in range(N)]
    added = [np.sum(same, axis=0) for same in zip(*contributions, strict=True)]
    return {"shard": wide(held()["shard"]), "replica": wide(held()["replica"]), "partial": added}


def norm() -> float:
    shards = sum(norm64(held(rank)["shard"]) ** 2 for rank in range(N))
    mine = truth()
    rest = [mine["replica"], *mine["partial"]]
    return math.sqrt(shards + sum(float(np.square(x).sum()) for x in rest))


def assert_scaled(tree: Any, factor: float, rtol: float = 1e-5) -> None:
    flat: Any = tree_flatten(tree)
    true_leaves: Any = tree_flatten(truth())
    for (path, leaf), (_, true) in zip(flat, true_leaves, strict=True):
        np.testing.assert_allclose(wide(leaf), true * factor, rtol=rtol, atol=rtol, err_msg=path)


FUNCTIONS: dict[str, Callable[[Any, float], Any]] = {
    "clip_grad_norm": lambda grads, most: dc.clip_grad_norm(grads, most, layout=LAYOUT),
    "clip_grad_norm, compiled": lambda grads, most: mx.compile(
        lambda tree: dc.clip_grad_norm(tree, most, layout=LAYOUT)
    )(grads),
    "average_and_clip": lambda grads, most: dc.average_and_clip(
        grads, most, group=mesh(one=1, x=N).group("one"), layout=LAYOUT
    ),
    "Clipper": lambda grads, most: _clipped(dc.Clipper(most, layout=LAYOUT), grads),
    "Clipper, average": lambda grads, most: _clipped(
        dc.Clipper(most, layout=LAYOUT, average=mesh(one=1, x=N).group("one")), grads
    ),
}


def _clipped(clipper: dc.Clipper, grads: Any) -> tuple[Any, mx.array]:
    clipped, report = clipper(grads)
    assert isinstance(report.norm, mx.array)
    return clipped, report.norm


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("share", [0.5, 2.0], ids=["clipped", "not clipped"])
def test_contributions_are_summed_and_counted_once(share: float, name: str) -> None:
    line()
    for _ in range(2):
        clipped, found = FUNCTIONS[name](held(), share * norm())
        assert relative(found, norm()) < 1e-6
        assert_scaled(clipped, min(share, 1.0))
        assert same_bits([clipped["replica"], *clipped["partial"], found])


@pytest.mark.parametrize("p", [1.0, 3.0, math.inf])
def test_every_norm_is_of_the_sums(p: float) -> None:
    line()
    shards = [wide(held(rank)["shard"]) for rank in range(N)]
    mine = truth()
    values = np.abs(np.concatenate([x.reshape(-1) for x in [*shards, mine["replica"], *mine["partial"]]]))
    expected = float(values.max()) if math.isinf(p) else float((values**p).sum() ** (1 / p))
    assert relative(dc.global_norm(held(), layout=LAYOUT, norm_type=p), expected) < 1e-5


def test_one_more_collective_where_leaves_are_partial(collectives: Counter[str]) -> None:
    line()
    mx.eval(dc.global_norm(held(), layout=LAYOUT))
    collectives.clear()
    without = {**LAYOUT, "partial": dc.Replicated()}
    mx.eval(dc.global_norm(held(), layout=without))
    assert collectives.total() == 1
    replicas = {"replica": dc.Replicated(), "shard": dc.Replicated(), "partial": dc.Replicated()}
    mx.eval(dc.global_norm(held(), layout=replicas))
    assert collectives.total() == 1


def test_integers_and_halves_are_summed_in_a_type_that_holds_the_sum() -> None:
    line()
    grads = {"i": mx.array([100, WORLD.rank]), "h": normal((7,), WORLD.rank, mx.bfloat16)}
    clipped, _ = dc.clip_grad_norm(grads, math.inf, layout=dc.Partial(AXIS))
    assert clipped["i"].tolist() == [100.0 * N, N * (N - 1) / 2]
    assert clipped["h"].dtype == mx.bfloat16
    assert_close(clipped["h"], np.sum([wide(normal((7,), rank, mx.bfloat16)) for rank in range(N)], axis=0), 2**-6)


def test_without_axes_all_ranks_are_meant() -> None:
    clipped, found = dc.clip_grad_norm({"w": mx.full((4,), float(WORLD.rank + 1))}, math.inf, layout=dc.Partial())
    assert clipped["w"].tolist() == [N * (N + 1) / 2] * 4
    assert relative(found, N * (N + 1)) < 1e-6


def test_check_layout_takes_the_sums_for_replicas() -> None:
    line()
    dc.check_layout(held(), LAYOUT)
    with pytest.raises(dc.LayoutError, match="partial"):
        dc.check_layout(held(), {**LAYOUT, "partial": dc.Replicated()})


def test_a_value_that_is_not_finite_on_one_rank_is_seen_by_all() -> None:
    line()
    grads = held()
    if WORLD.rank == N - 1:
        grads["partial"][0][1, 1] = math.nan
    clipped, report = dc.Clipper(1.0, layout=LAYOUT, check="never")(grads)
    assert (report.finite.item(), report.skipped.item()) == (False, True)
    assert all(not mx.any(leaf).item() for leaf in leaves(clipped))


def test_adaptive_clipping_takes_the_sums() -> None:
    line()
    grads, weights = held(), held(99)
    layout = {**LAYOUT, "shard": dc.Sharded(AXIS, dim=0)}
    clipped = dc.adaptive_clip_grad(grads, weights, 1e9, layout=layout)
    assert_scaled(clipped, 1.0)


@pytest.mark.mpi
@pytest.mark.skipif(N != 4, reason="needs 2 x 2 ranks")
@pytest.mark.parametrize("rank_batch", [None, 4])
def test_contributions_are_summed_over_one_axis_and_averaged_over_the_other(rank_batch: int | None) -> None:
    axes = square()
    layout = {"w": dc.Sharded("tp"), "gate": dc.Partial("tp"), "bias": dc.Replicated()}

    def of(rank: int) -> dict[str, mx.array]:
        dp = rank // 2
        return {"w": normal((6,), (rank, 1)), "gate": normal((3, 2), (rank, 2)), "bias": normal((4,), (dp, 3))}

    every = [of(rank) for rank in range(4)]
    gate = sum(wide(tree["gate"]) for tree in every) / 2
    bias = (wide(every[0]["bias"]) + wide(every[2]["bias"])) / 2
    shards = [(wide(every[tp]["w"]) + wide(every[tp + 2]["w"])) / 2 for tp in (0, 1)]
    expected = math.sqrt(sum(float(np.square(x).sum()) for x in [gate, bias, *shards]))
    clipper = dc.Clipper(0.1, layout=layout, average=axes.group("dp"), rank_batch=rank_batch)
    for _ in range(2):
        clipped, report = clipper(of(WORLD.rank))
        assert relative(report.norm, expected) < 1e-6
        np.testing.assert_allclose(wide(clipped["gate"]), gate * 0.1 / expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(wide(clipped["w"]), shards[WORLD.rank % 2] * 0.1 / expected, rtol=1e-4, atol=1e-7)
    averaged, found = dc.average_and_clip(of(WORLD.rank), math.inf, group=axes.group("dp"), layout=layout)
    assert relative(found, expected) < 1e-6
    np.testing.assert_allclose(wide(averaged["gate"]), gate, rtol=1e-5, atol=1e-6)
    with pytest.raises(dc.LayoutError, match="averaged over the axis dp"):
        dc.average_and_clip(of(WORLD.rank), 1.0, group=axes.group("dp"), layout=dc.Partial("dp"))


def test_names_of_axes_are_checked() -> None:
    with pytest.raises(TypeError, match="Partial"):
        dc.Partial(1)  # type: ignore[arg-type]
    with pytest.raises(dc.LayoutError, match="no mesh"):
        dc.global_norm({"w": mx.ones(3)}, layout=dc.Partial("nothing"))
