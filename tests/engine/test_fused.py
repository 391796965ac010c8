"""Sums over leaves by fused operations, as a device works: a second CPU stream plays it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from devices import play_device
from reference import Array, alone, normal, relative, wide

from distclip.engine import fused, operations

pytestmark = alone

# The CPU, which plays the device, adds up in a single running float32 sum.
ERROR = 1e-3
DTYPES = [mx.float32, mx.bfloat16, mx.float16, mx.complex64, mx.int32, mx.bool_]
SHAPES = [
    (3, 5),
    (1000,),
    (1025,),
    (4097,),
    (29 * 1733,),
    (5021, 7),
    (100, 100),
    (7, 11, 13),
    (64, 3, 32, 32),
    (0, 4),
    (),
    (1,),
]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> mx.Stream:
    return play_device(monkeypatch)


Measure = Callable[[list[mx.array], mx.Stream], mx.array]
MEASURES: dict[str, tuple[Measure, Callable[[Array], float]]] = {
    "squares": (operations.sum_squares, lambda x: float((x**2).sum())),
    "magnitudes": (operations.sum_abs, lambda x: float(x.sum())),
    "largest": (operations.max_abs, lambda x: float(x.max(initial=0.0))),
    "powers": (
        lambda leaves, on: operations.sum_powers(leaves, 3.0, mx.array(4.0, mx.float64), on)[:, None],
        lambda x: float(((x / 4) ** 3).sum()),
    ),
}


@pytest.mark.parametrize("name", MEASURES)
def test_it_is_the_float64_measure_of_each_leaf(name: str, device: mx.Stream) -> None:
    dtypes = DTYPES if name == "squares" else DTYPES[:2]  # each is compiled
    leaves = [normal(shape, i, dtype) for i, (shape, dtype) in enumerate(product(SHAPES, dtypes))]
    leaves += [x.T for x in leaves if x.ndim == 2] + [leaves[-1], normal((64, 6), 3)[::2]]
    measure, truth = MEASURES[name]
    for leaf, row in zip(leaves, np.array(measure(leaves, device)), strict=True):
        assert relative(row[0], truth(np.abs(wide(leaf)))) <= ERROR
        assert not row[1:].any()


@pytest.mark.parametrize("size", [100, 5000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted(bad: float, size: int, device: mx.Stream) -> None:
    leaf = mx.ones(size)
    leaf[7] = bad
    for measure in (operations.sum_squares, operations.sum_abs, operations.max_abs):
        row, good = np.array(measure([leaf, mx.ones(9)], device))
        np.testing.assert_equal(row, [abs(bad), 1.0])
        assert good[1] == 0


def test_half_precision_is_added_in_float32(device: mx.Stream) -> None:
    leaf = mx.full((1 << 15,), 3.0, mx.bfloat16)
    assert relative(operations.sum_squares([leaf], device)[0, 0], 9.0 * (1 << 15)) <= ERROR
    assert relative(operations.sum_squares([leaf.astype(mx.float16) * 100], device)[0, 0], 9e4 * (1 << 15)) <= ERROR


def test_a_leaf_is_cut_where_it_can_be() -> None:
    assert fused._cut((16, 3)) == (8, 0)
    assert fused._cut((3, 16)) == (8, 1)
    assert fused._cut((21, 5)) == (7, 0)
    assert fused._cut((29, 31)) == (1, 0)


def test_a_norm_by_operations_may_be_differentiated_and_compiled(device: mx.Stream) -> None:
    x = normal((40, 50), 1)

    def norm(x: mx.array) -> mx.array:
        return operations.sum_squares([x], device)[0, 0].astype(mx.float32, stream=mx.cpu)

    np.testing.assert_allclose(wide(mx.grad(norm)(x)), 2 * wide(x), rtol=1e-6)
    assert relative(mx.compile(norm)(x), float((wide(x) ** 2).sum())) <= ERROR
