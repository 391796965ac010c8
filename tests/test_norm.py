"""The global norm: the truth in float64 for every layout, the same bits on every rank, one collective."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from reference import (
    DTYPES,
    FLOATS,
    NORM_ERROR,
    SUM_ERROR,
    line,
    norm64,
    normal,
    powers64,
    relative,
    same_bits,
    several,
    square,
)
from schemes import NATIVE

import distclip as dc

INF = math.inf
NORM_TYPES = [2.0, 1.0, 3.0, 0.5, INF]


def error(norm_type: float) -> float:
    """What is allowed: powers of other degrees are taken by MLX operations, in float32."""
    return NORM_ERROR if norm_type in (1, 2, INF) else SUM_ERROR


# What one rank holds when the whole gradient is sharded, by its rank.
SHARDS: dict[str, Callable[[int, mx.Dtype, float], Any]] = {
    "one leaf": lambda r, d, at: normal((40, 50), r, d, at),
    "nested": lambda r, d, at: {
        "a": [normal((30,), r, d, at), (normal((2, 3, 4), r + 10, d, at),)],
        "b": normal((), r, d, at),
    },
    "hundreds": lambda r, d, at: {f"w{i}": normal((i % 17, 9), (r, i), d, at) for i in range(300)},
    "uneven shards": lambda r, d, at: {"w": normal((100 + 37 * r, 11), r, d, at), "b": normal((r,), r, d, at)},
    "rank 0 empty": lambda r, d, at: {} if r == 0 else {"w": normal((64, 3), r, d, at)},
    "last rank empty": lambda r, d, at: [] if r == dc.init().size - 1 else [normal((64, 3), r, d, at)],
    "one leaf each": lambda r, d, at: {f"stage{r}": normal((8, 8 + r), r, d, at)},
}


@pytest.mark.parametrize(
    ("dtype", "at"),
    [(d, at) for name, d in FLOATS.items() for at in ((1e-4, 1, 1e4) if name == "float16" else (1e-15, 1, 1e15))],
    ids=str,
)
@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
def test_sharded_norm_is_the_truth(shards: Any, dtype: mx.Dtype, at: float, world: dc.World) -> None:
    norm = dc.global_norm(shards(world.rank, dtype, at))
    truth = norm64([shards(rank, dtype, at) for rank in range(world.size)])
    assert (norm.dtype, norm.shape) == (mx.float32, ())
    assert relative(norm, truth) <= NORM_ERROR
    assert same_bits(norm)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_sharded_norm_of_millions_is_the_truth(dtype: mx.Dtype, world: dc.World) -> None:
    norm = dc.global_norm(normal((1000, 1001), world.rank, dtype))
    assert relative(norm, norm64([normal((1000, 1001), rank, dtype) for rank in range(world.size)])) <= NORM_ERROR
    assert same_bits(norm)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("name", ["nested", "uneven shards", "rank 0 empty"])
@pytest.mark.parametrize("at", [1e-15, 1.0, 1e15])
def test_sharded_p_norm_is_the_truth(name: str, norm_type: float, at: float, world: dc.World) -> None:
    norm = dc.global_norm(SHARDS[name](world.rank, mx.float32, at), norm_type=norm_type)
    truth = norm64([SHARDS[name](rank, mx.float32, at) for rank in range(world.size)], norm_type)
    assert relative(norm, truth) <= error(norm_type)
    assert same_bits(norm)


def mixed(rank: int, dtype: mx.Dtype = mx.float32) -> dict[str, Any]:
    return {
        "shard": {"w": normal((70, 30), rank, dtype), "b": normal((5,), rank + 50, dtype)},
        "replica": [normal((40, 41), 100, dtype), normal((), 101, dtype)],
    }


def mixed_truth(size: int, p: float = 2.0, dtype: mx.Dtype = mx.float32) -> float:
    return norm64([[mixed(rank, dtype)["shard"] for rank in range(size)], mixed(0, dtype)["replica"]], p)


@pytest.mark.parametrize("axes", [(), ("x",)], ids=["group", "axis"])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_a_replica_beside_shards_counts_once(norm_type: float, axes: tuple[str, ...], world: dc.World) -> None:
    line()
    layout = {"shard": dc.Sharded(*axes), "replica": dc.Replicated()}
    norm = dc.global_norm(mixed(world.rank), layout=layout, norm_type=norm_type)
    assert relative(norm, mixed_truth(world.size, norm_type)) <= error(norm_type)
    assert same_bits(norm)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_type_counts_in_full(dtype: mx.Dtype, world: dc.World) -> None:
    layout = {"shard": dc.Sharded(), "replica": dc.Replicated()}
    norm = dc.global_norm(mixed(world.rank, dtype), layout=layout)
    assert norm.dtype == mx.float32
    assert relative(norm, mixed_truth(world.size, dtype=dtype)) <= NORM_ERROR


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_complex_values_count_by_their_magnitude(norm_type: float, world: dc.World) -> None:
    norm = dc.global_norm(normal((50, 3), world.rank, mx.complex64), norm_type=norm_type)
    truth = norm64([normal((50, 3), rank, mx.complex64) for rank in range(world.size)], norm_type)
    assert relative(norm, truth) <= error(norm_type)


GRID = {"dp": ("dp",), "tp": ("tp",), "both": ("dp", "tp"), "neither": ()}


def on_grid(rank: int, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    dp, tp = divmod(rank, 2)
    place = {"dp": (dp, 9), "tp": (9, tp), "both": (dp, tp), "neither": (9, 9)}
    return {name: normal((60, 7), (i, *place[name]), dtype) for i, name in enumerate(GRID)}


def grid_truth(p: float, dtype: mx.Dtype) -> float:
    holders = {"dp": (0, 2), "tp": (0, 1), "both": (0, 1, 2, 3), "neither": (0,)}
    return norm64([on_grid(rank, dtype)[name] for name, ranks in holders.items() for rank in ranks], p)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_each_parameter_counts_once_on_a_mesh(norm_type: float, dtype: mx.Dtype, world: dc.World) -> None:
    square()
    layout = {name: dc.Sharded(*axes) if axes else dc.Replicated() for name, axes in GRID.items()}
    norm = dc.global_norm(on_grid(world.rank, dtype), layout=layout, norm_type=norm_type)
    assert relative(norm, grid_truth(norm_type, dtype)) <= error(norm_type)
    assert same_bits(norm)


@pytest.mark.mpi(min_size=4)
def test_a_group_of_the_mesh_has_its_own_norm(world: dc.World, collectives: Counter[str]) -> None:
    group = square().group("tp")
    first = world.rank // 2 * 2
    layout = {"w": dc.Sharded("tp"), "v": dc.Sharded(), "r": dc.Replicated()}
    norm = dc.global_norm(
        {k: normal((9, 9), world.rank if k != "r" else 7) for k in layout}, layout=layout, group=group
    )
    shards = [normal((9, 9), rank) for rank in (first, first + 1) for _ in "wv"]
    assert relative(norm, norm64([*shards, normal((9, 9), 7)])) <= NORM_ERROR
    assert collectives["all_sum"] == 1
    assert collectives["all_gather"] <= 1, "the check of a group's first call"


# --------------------------------------------------------------------------------- the number of collectives

LAYOUTS: dict[str, Any] = {
    "sharded": dc.Sharded(),
    "over an axis": dc.Sharded("x"),
    "prefix": {"shard": dc.Sharded("x"), "replica": dc.Replicated()},
    "leaf by leaf": {
        "shard": {"w": dc.Sharded(), "b": dc.Sharded("x")},
        "replica": [dc.Sharded("x"), dc.Replicated()],
    },
    "callable": lambda path, leaf: dc.Sharded() if path.startswith("shard") else dc.Replicated(),
}


@several
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_with_shards_takes_one_collective(
    layout: Any, norm_type: float, world: dc.World, collectives: Counter[str]
) -> None:
    line()
    mx.eval(dc.global_norm(mixed(world.rank), layout=layout, norm_type=norm_type))
    assert collectives == {"all_sum": 1}


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize(
    "layout",
    [dc.Replicated(), {"shard": dc.Replicated(), "replica": [dc.Replicated()] * 2}, lambda path, leaf: dc.Replicated()],
    ids=["one for all", "tree", "callable"],
)
def test_replicas_alone_take_no_collective(layout: Any, norm_type: float, collectives: Counter[str]) -> None:
    norm = dc.global_norm(mixed(0), layout=layout, norm_type=norm_type)
    assert relative(norm, norm64(mixed(0), norm_type)) <= error(norm_type)
    assert not collectives
    assert same_bits(norm)


@several
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_what_is_reduced_has_one_form_whatever_a_rank_holds(
    norm_type: float, world: dc.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = [
        {},
        normal((9,), 1, mx.bfloat16),
        normal((9,), 2, mx.float64),
        [normal((3000,), 3, mx.float16)] * 3,
    ]
    sent: list[tuple[Any, ...]] = []
    original = mx.distributed.all_sum

    def spy(x: mx.array, **kwargs: Any) -> mx.array:
        sent.append((x.dtype, x.shape))
        return original(x, **kwargs)

    monkeypatch.setattr(mx.distributed, "all_sum", spy)
    norm = dc.global_norm(held[world.rank], norm_type=norm_type)
    assert relative(norm, norm64(held[: world.size], norm_type)) <= error(norm_type)
    length = {1.0: 2, 2.0: 2, INF: world.size + 1}.get(norm_type, 2 * world.size + 1)
    assert sent == [(mx.float64, (length,))]


# ------------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("value", [math.nan, INF, -INF], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_bad_value_on_one_rank_is_seen_by_all(
    dtype: mx.Dtype, value: float, norm_type: float, world: dc.World
) -> None:
    layout = {"shard": dc.Sharded(), "replica": dc.Replicated()}
    for bad in range(world.size):
        grads = mixed(world.rank, dtype)
        if world.rank == bad:
            grads["shard"]["w"][69, 29] = value
        norm: Any = dc.global_norm(grads, layout=layout, norm_type=norm_type).item()
        assert math.isnan(norm) if math.isnan(value) else math.isinf(norm)


@several
def test_a_nan_beside_an_infinity_of_another_rank_stays_bad(world: dc.World) -> None:
    for norm_type in NORM_TYPES:
        norm = dc.global_norm(mx.array([math.nan if world.rank == 0 else INF, 1.0]), norm_type=norm_type)
        assert not math.isfinite(norm.item())  # type: ignore[arg-type]


def test_squares_beyond_float32_are_right_or_infinite(world: dc.World) -> None:
    norm: Any = dc.global_norm(mx.full((4,), 1e30)).item()
    assert math.isinf(norm) or relative(norm, 2e30 * math.sqrt(world.size)) <= NORM_ERROR


def test_half_precision_squares_do_not_overflow(world: dc.World) -> None:
    norm = dc.global_norm([mx.full((3000,), 6e4, mx.float16), mx.full((8,), 3e38**0.49, mx.bfloat16)])
    truth = norm64([mx.full((3000,), 6e4, mx.float16), mx.full((8,), 3e38**0.49, mx.bfloat16)])
    assert relative(norm, truth * math.sqrt(world.size)) <= NORM_ERROR


# ---------------------------------------------------------------------------------------------- ways of use


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_it_works_inside_compile(norm_type: float, world: dc.World) -> None:
    layout = {"shard": dc.Sharded(), "replica": dc.Replicated()}
    compiled = mx.compile(lambda grads: dc.global_norm(grads, layout=layout, norm_type=norm_type))
    for _ in range(2):
        norm = compiled(mixed(world.rank))
        assert relative(norm, mixed_truth(world.size, norm_type)) <= error(norm_type)
        assert same_bits(norm)


@pytest.mark.parametrize(
    "stream", [mx.cpu, mx.Device(mx.cpu), mx.default_stream(mx.cpu)], ids=["type", "device", "stream"]
)
def test_a_stream_can_be_named(stream: Any, world: dc.World) -> None:
    norm = dc.global_norm(mixed(world.rank), stream=stream)
    assert relative(norm, norm64([mixed(rank) for rank in range(world.size)])) <= NORM_ERROR


@pytest.mark.parametrize("grads", [{}, [], (), {"a": {}, "b": [None]}, None, mx.zeros((0,))], ids=str)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_an_empty_gradient_has_norm_0(grads: Any, norm_type: float) -> None:
    norm = dc.global_norm(grads, norm_type=norm_type)
    assert (norm.item(), norm.dtype) == (0.0, mx.float32)


def test_none_leaves_are_passed_over(world: dc.World) -> None:
    norm = dc.global_norm({"a": None, "b": [normal((5,), world.rank), None]})
    assert relative(norm, norm64([normal((5,), rank) for rank in range(world.size)])) <= NORM_ERROR


@several
def test_replicas_called_sharded_are_too_large_by_the_root_of_the_ranks(world: dc.World) -> None:
    norm = dc.global_norm(normal((100,), 3))
    assert relative(norm, norm64(normal((100,), 3)) * math.sqrt(world.size)) <= NORM_ERROR


@pytest.mark.parametrize("norm_type", [0, -1.0, math.nan, -INF])
def test_a_norm_type_not_above_0_is_an_error(norm_type: float) -> None:
    with pytest.raises(ValueError, match="norm_type should be > 0"):
        dc.global_norm({"w": mx.ones(3)}, norm_type=norm_type)


@pytest.mark.parametrize("leaf", [1.0, "w", np.ones(3), object], ids=lambda leaf: type(leaf).__name__)
def test_a_leaf_that_is_no_array_is_named(leaf: Any) -> None:
    with pytest.raises(TypeError, match=r"'a\.1'"):
        dc.global_norm({"a": [mx.ones(3), leaf]})


def test_a_tree_of_all_lengths_agrees_with_its_parts(world: dc.World) -> None:
    """The root of the sum of the squares of parts is the norm of the whole."""
    grads = mixed(world.rank)
    whole: Any = dc.global_norm(grads).item()
    parts: list[Any] = [dc.global_norm(part).item() for part in (grads["shard"], grads["replica"])]
    assert relative(math.hypot(*parts), whole) <= 1e-6
    assert relative(whole**2, powers64([mixed(rank) for rank in range(world.size)])) <= 2e-6


@pytest.mark.parametrize(("p", "at"), [(100, 1e-4), (50, 1e-7), (200, 1e-2), (100, 2000.0), (64, 1e5), (1000, 3.0)])
def test_high_powers_neither_vanish_nor_overflow(p: float, at: float, world: dc.World) -> None:
    """The ranks' own magnitudes lie far apart, and one of them has zeros alone."""
    held = [mx.full((10,), at * 10.0 ** (-3 * rank) if rank < 2 else 0.0) for rank in range(world.size)]
    norm = dc.global_norm({"a": held[world.rank], "b": mx.full((4,), at / 2)}, norm_type=p)
    largest = norm64([held[0], mx.full((4 * world.size,), at / 2)], math.inf)
    truth = largest * (10 + 4 * world.size * 0.5**p) ** (1 / p)
    assert relative(norm, truth) <= 1e-5


def test_a_rank_without_sharded_leaves_takes_part_as_the_tree_says(world: dc.World) -> None:
    """The layout is the same everywhere; the experts are on the last rank alone."""
    layout = {"router": dc.Replicated(), "experts": dc.Sharded()}
    last = world.rank == world.size - 1
    grads = {"router": mx.ones(4), "experts": {"e0": mx.full((3,), 2.0)} if last else {}}
    norm = dc.global_norm(grads, layout=layout)
    assert norm.item() == 4.0


@pytest.mark.parametrize("leaves", [1, 2])
def test_a_function_compiled_for_any_shape(leaves: int, world: dc.World) -> None:
    if world.size > 1 or not NATIVE:
        pytest.skip("MLX's collectives, and its operations on large leaves, need shapes")

    def measure(x: mx.array) -> mx.array:
        return dc.global_norm([x] * leaves)

    norm: Any = mx.compile(measure, shapeless=True)
    for size in (3, 4):
        assert norm(mx.ones(size)).item() == pytest.approx(math.sqrt(leaves * size))
