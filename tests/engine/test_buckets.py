"""The sums over ranks: measured and scaled by leaf, by whichever engine, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from reference import FLOATS, NORM_ERROR, Array, assert_close, normal, powers64, relative, several, wide

import distclip as dc
from distclip.engine import kernels
from distclip.engine.buckets import sum_over_ranks
from distclip.engine.native import Sums

WORLD = dc.init()
SHAPES: list[tuple[int, ...]] = [(7,), (0,), (300, 400), (), (64, 64), (33,), (2, 0), (400_000,), (7,)]
TYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "complex64": mx.complex64, "float64": mx.float64}


def mixed(rank: int) -> list[mx.array]:
    """One rank's leaves, whole numbers so that every sum is exact."""
    leaves = []
    for i, shape in enumerate(SHAPES):
        values = np.rint(np.random.default_rng((rank, i)).standard_normal(shape) * 3)
        leaves.append(mx.array(values.astype(np.float32)).astype(list(TYPES.values())[i % len(TYPES)], stream=mx.cpu))
    return leaves


def totals() -> list[Array]:
    by_rank = [mixed(rank) for rank in range(WORLD.size)]
    return [np.sum([wide(leaves[i]) for leaves in by_rank], axis=0) for i in range(len(SHAPES))]


def over_ranks(
    leaves: list[mx.array],
    norm_type: float = 2.0,
    bucket_bytes: int = 1 << 16,
    before: float = 1.0,
    communication_dtype: mx.Dtype | None = None,
) -> Sums:
    return sum_over_ranks(
        leaves,
        group=WORLD.group,
        before=before,
        norm_type=norm_type,
        communication_dtype=communication_dtype,
        bucket_bytes=bucket_bytes,
        stream=mx.cpu,
        communication=WORLD.stream,
    )


@pytest.mark.parametrize("bucket_bytes", [0, 1 << 10, 1 << 22])
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_sums_are_measured_by_leaf(norm_type: float, bucket_bytes: int) -> None:
    leaves = mixed(WORLD.rank)
    measured = over_ranks(leaves, norm_type, bucket_bytes).measured
    assert (measured.dtype, measured.shape) == (mx.float64, (len(leaves), 2))
    for (value, bad), total in zip(np.array(measured), totals(), strict=True):
        assert bad == 0
        assert relative(value, float((np.abs(total) ** norm_type).sum())) <= 2 * NORM_ERROR


def test_a_value_that_is_not_finite_on_one_rank_counts_in_its_leaf() -> None:
    leaves = [normal((5000,), seed) for seed in range(4)]
    if WORLD.rank == WORLD.size - 1:
        leaves[2] = mx.where(mx.arange(5000) == 77, math.nan, leaves[2])
    measured = np.array(over_ranks(leaves).measured)
    assert np.isnan(measured[:, 0]).tolist() == [False, False, True, False]
    assert measured[:, 1].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("finite", [None, True, False])
@pytest.mark.parametrize("by_leaf", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 3.0])
def test_sums_are_scaled_by_one_factor_or_by_leaf(norm_type: float, by_leaf: bool, finite: bool | None) -> None:
    leaves = mixed(WORLD.rank)
    factors = [0.5, 2.0, 0.25, 1.0, 4.0, 0.125, 1.0, 2.0, 0.5] if by_leaf else [0.5] * len(leaves)
    factor = mx.array([f for f in factors for _ in range(2)])[::2] if by_leaf else mx.array(0.5)
    sums = over_ranks(leaves, norm_type)
    scaled = sums.scaled(factor, None if finite is None else mx.array(finite))
    for x, leaf, total, f in zip(scaled, leaves, totals(), factors, strict=True):
        assert (x.dtype, x.shape) == (leaf.dtype, leaf.shape)
        assert_close(x, total * (0 if finite is False else f))


def test_a_factor_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="factor"):
        over_ranks(mixed(WORLD.rank)).scaled(mx.ones(3))


def test_the_sums_of_leaves_can_be_had_where_the_kernel_does_not_measure_them() -> None:
    for x, total in zip(over_ranks(mixed(WORLD.rank), norm_type=3.0).leaves, totals(), strict=True):
        np.testing.assert_array_equal(wide(x), total)


ORDERS: dict[str, Callable[[mx.array], mx.array]] = {
    "the same": lambda x: x,
    "transposed on rank 0": lambda x: mx.contiguous(x.T).T if WORLD.rank == 0 else x,
    "transposed everywhere": lambda x: mx.contiguous(x.T).T,
    "transposed on odd ranks": lambda x: mx.contiguous(x.T).T if WORLD.rank % 2 else x,
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_ranks_may_hold_leaves_in_different_orders_of_memory(order: Callable[[mx.array], mx.array]) -> None:
    shapes: list[tuple[int, ...]] = [(30, 20), (300, 400), (5,)]

    def of(rank: int) -> list[mx.array]:
        return [mx.round(normal(shape, (rank, i), at=5.0)) for i, shape in enumerate(shapes)]

    leaves = [order(x) for x in of(WORLD.rank)]
    mx.eval(leaves)
    expected = [sum(wide(of(rank)[i]) for rank in range(WORLD.size)) for i in range(len(shapes))]
    sums = over_ranks(leaves, bucket_bytes=1 << 14)
    measured = np.array(sums.measured)
    for i, (x, total) in enumerate(zip(sums.scaled(mx.array(1.0)), expected, strict=True)):
        np.testing.assert_array_equal(wide(x), total)
        assert relative(measured[i, 0], powers64(mx.array(total, mx.float64))) <= 2 * NORM_ERROR


@several
@pytest.mark.skipif(kernels.engine(mx.cpu) == "mlx", reason="MLX operations round a product to the leaf's type first")
@pytest.mark.parametrize("sent", FLOATS.values(), ids=[f"as-{name}" for name in FLOATS])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_values_are_converted_to_the_last_bit(dtype: mx.Dtype, sent: mx.Dtype) -> None:
    patterns = mx.array(np.arange(2**16, dtype=np.uint16))
    halves = [patterns.view(half).astype(mx.float32) for half in (mx.float16, mx.bfloat16)]
    values = mx.concatenate([*halves, *(x * 1.0005 for x in halves)]).astype(dtype)
    finite = values[mx.array(np.flatnonzero(np.abs(wide(values)) < 1e38))]
    leaves = [*(finite[1000 : 1000 + size] for size in range(70)), finite, finite[1:]]
    sums = over_ranks(
        leaves if WORLD.rank == 0 else [mx.zeros_like(x) for x in leaves], before=0.3, communication_dtype=sent
    )
    for x, leaf in zip(sums.scaled(mx.array(1.0)), leaves, strict=True):
        expected = (leaf.astype(mx.float32) * 0.3).astype(sent).astype(dtype)
        np.testing.assert_array_equal(wide(x), wide(expected))
