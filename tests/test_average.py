"""Data parallel: the float64 mean, in few messages, and clipped in one go."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import devices
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_map
from reference import (
    DTYPES,
    EPSILON,
    FLOATS,
    WORLD,
    Array,
    leaves,
    line,
    norm64,
    normal,
    powers64,
    relative,
    same_bits,
    several,
    square,
    told_by_all,
    wide,
)

import distclip as dc
from distclip.engine import kernels

N = WORLD.size
IN_FLIGHT = devices.played() == "stream"  # buckets are sent as they are made, and every call compares the trees
KERNEL = None if IN_FLIGHT else kernels.native_kernel(None)
ORDER = int(KERNEL is not None)  # the kernel's ranks first agree on the order of memory, in 16 bytes


def counted(collectives: Counter[str], run: Callable[[], Any]) -> tuple[Any, int]:
    """What a function returns, evaluated, and how many all-reduces that took."""
    collectives.clear()
    before = KERNEL.scheduled_all_reduces() if KERNEL else 0
    result = run()
    mx.eval(result)
    return result, collectives["all_sum"] + (KERNEL.scheduled_all_reduces() - before if KERNEL else 0)


PARTIALS: dict[str, Callable[[int, mx.Dtype], Any]] = {
    "one leaf": lambda r, d: normal((40, 5), r, d),
    "0-d": lambda r, d: normal((), r, d),
    "dict": lambda r, d: {"w": normal((20, 30), r, d), "b": normal((20,), r + 9, d)},
    "nested": lambda r, d: {
        "a": [normal((3,), r, d), None, (normal((2, 2), r + 9, d),)],
        "b": {},
        "c": normal((), r, d),
    },
    "an empty leaf": lambda r, d: [normal((0, 3), r, d), normal((8,), r, d)],
    "transposed": lambda r, d: [normal((8, 9), r, d).T, normal((8,), r, d)],
    "hundreds": lambda r, d: {f"w{i}": normal((i % 7, 5), (r, i), d) for i in range(300)},
}


def mean64(tree: Callable[[int], Any]) -> list[Array]:
    """The mean of each leaf over the ranks."""
    return [sum(values) / N for values in zip(*([wide(x) for x in leaves(tree(r))] for r in range(N)), strict=True)]


def assert_tree_close(found: Any, truth: list[Array], rtol: float | None = None) -> None:
    """Within the rounding of a sum over the ranks, relative to each leaf's largest value."""
    for leaf, expected in zip(leaves(found), truth, strict=True):
        error = 4 * EPSILON[leaf.dtype] if rtol is None else rtol
        np.testing.assert_allclose(wide(leaf), expected, atol=error * float(np.abs(expected).max(initial=1.0)), rtol=0)


@pytest.mark.parametrize("dtype", [d for n, d in DTYPES.items() if n != "bool"], ids=str)
@pytest.mark.parametrize("tree", PARTIALS.values(), ids=PARTIALS)
def test_the_average_is_the_mean(tree: Any, dtype: mx.Dtype, world: dc.World) -> None:
    grads = tree(world.rank, dtype)
    averaged = dc.average_gradients(grads)
    assert_tree_close(averaged, mean64(lambda r: tree(r, dtype)))
    expected_type = dtype if mx.issubdtype(dtype, mx.inexact) else mx.float32
    assert {leaf.dtype for leaf in leaves(averaged)} == {expected_type}
    assert tree_map(lambda x: x is None or x.shape, averaged) == tree_map(lambda x: x is None or x.shape, grads)
    assert same_bits(averaged)


@pytest.mark.parametrize("grads", [{}, [], {"a": None, "b": [None]}], ids=str)
def test_a_tree_without_leaves_comes_back(grads: Any) -> None:
    assert dc.average_gradients(grads) == grads
    clipped, norm = dc.average_and_clip(grads, 1.0)
    assert (clipped, norm.item()) == (grads, 0.0)


def several_types(rank: int) -> dict[str, Any]:
    return {name: [normal((9, i + 1), (rank, i), dtype) for i in range(5)] for name, dtype in FLOATS.items()}


@several
def test_each_type_takes_one_message(world: dc.World, collectives: Counter[str]) -> None:
    dc.average_gradients(several_types(world.rank))
    averaged, messages = counted(collectives, lambda: dc.average_gradients(several_types(world.rank)))
    assert messages == 3 + ORDER
    assert_tree_close(averaged, mean64(several_types))
    assert {name: averaged[name][0].dtype for name in FLOATS} == FLOATS


@several
@pytest.mark.parametrize(
    ("bucket_bytes", "messages"),
    [(0, 6), (1, 6), (4000, 6), (4001, 3), (8000, 3), (12_000, 2), (24_000, 1), (2**25, 1)],
)
def test_a_bucket_closes_when_it_is_full(
    bucket_bytes: int, messages: int, world: dc.World, collectives: Counter[str]
) -> None:
    grads = {f"w{i}": normal((1000,), (world.rank, i)) for i in range(6)}  # of 4,000 bytes each
    mx.eval(dc.average_gradients(grads))
    averaged, found = counted(collectives, lambda: dc.average_gradients(grads, bucket_bytes=bucket_bytes))
    assert found == messages + ORDER
    assert_tree_close(averaged, mean64(lambda r: {f"w{i}": normal((1000,), (r, i)) for i in range(6)}))
    (_, norm), found = counted(collectives, lambda: dc.average_and_clip(grads, 1.0, bucket_bytes=bucket_bytes))
    assert found == messages + ORDER
    assert relative(norm, norm64(averaged)) <= 1e-6
    clipper = dc.Clipper(1.0, average=True, bucket_bytes=bucket_bytes)
    (_, report), found = counted(collectives, lambda: clipper(grads))
    assert found == messages + ORDER
    assert relative(report.norm, norm64(averaged)) <= 1e-6


@several
def test_all_types_travel_together_in_the_type_asked_for(collectives: Counter[str]) -> None:
    fine = 1 + 2.0**-12  # of which bfloat16 and float16 keep 1
    grads = {name: mx.full((100,), fine, dtype) for name, dtype in FLOATS.items()}
    mx.eval(dc.average_gradients(grads))
    for sent in FLOATS.values():
        averaged, messages = counted(
            collectives,
            lambda sent=sent: dc.average_gradients(grads, communication_dtype=sent),  # type: ignore[misc]
        )
        assert messages == (1 + ORDER if KERNEL else 3)
        kept = fine if sent == mx.float32 else 1.0
        assert relative(averaged["float32"].max(), kept) <= 2**-23
        clipper = dc.Clipper(math.inf, average=True, communication_dtype=sent)
        (averaged, _), messages = counted(collectives, lambda clipper=clipper: clipper(grads))  # type: ignore[misc]
        assert messages == (1 + ORDER if KERNEL else 3)
        assert relative(averaged["float32"].max(), kept) <= 2**-23


@several
@pytest.mark.skipif(KERNEL is not None, reason="the kernel sends by itself")
def test_what_is_sent_has_the_type_asked_for(world: dc.World, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[mx.Dtype] = []
    original = mx.distributed.all_sum

    def spy(x: mx.array, **kwargs: Any) -> mx.array:
        sent.append(x.dtype)
        return original(x, **kwargs)

    monkeypatch.setattr(mx.distributed, "all_sum", spy)
    for dtype in FLOATS.values():
        mx.eval(dc.average_gradients(several_types(world.rank), communication_dtype=dtype))
        assert sent == [dtype] * 3
        sent.clear()


@pytest.mark.parametrize("sent", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_the_mean_is_as_exact_as_what_is_sent(dtype: mx.Dtype, sent: mx.Dtype, world: dc.World) -> None:
    tree = {"w": normal((50, 6), world.rank, dtype), "b": normal((), world.rank, dtype)}
    averaged = dc.average_gradients(tree, communication_dtype=sent)
    assert {leaf.dtype for leaf in leaves(averaged)} == {dtype}
    truth = mean64(lambda r: {"w": normal((50, 6), r, dtype), "b": normal((), r, dtype)})
    assert_tree_close(averaged, truth, 4 * max(EPSILON[dtype], EPSILON[sent]))


def test_float32_communication_rounds_bfloat16_once(world: dc.World) -> None:
    averaged = dc.average_gradients(normal((900,), world.rank, mx.bfloat16), communication_dtype=mx.float32)
    truth = mean64(lambda r: normal((900,), r, mx.bfloat16))[0]
    assert np.all(np.abs(wide(averaged) - truth) <= np.abs(truth) * 2**-8 + 1e-6)


@pytest.mark.parametrize("sent", [None, mx.float16])
def test_half_precision_sums_do_not_overflow(sent: mx.Dtype | None) -> None:
    dtype = mx.float16 if sent is None else mx.float32
    grads = {"w": mx.full((30,), 6e4, dtype), "v": mx.full((3,), 1.0)}
    assert_tree_close(dc.average_gradients(grads, communication_dtype=sent), [wide(x) for x in leaves(grads)], 2e-3)
    clipped, norm = dc.average_and_clip(grads, math.inf, communication_dtype=sent)
    assert relative(norm, norm64(grads)) <= 1e-3
    assert_tree_close(clipped, [wide(x) for x in leaves(grads)], 2e-3)


@pytest.mark.parametrize("dtype", [mx.int8, mx.int32, mx.uint8, mx.bool_], ids=str)
def test_sums_of_integers_do_not_overflow(dtype: mx.Dtype) -> None:
    largest = {mx.int8: 100, mx.int32: 2**31 - 1, mx.uint8: 200, mx.bool_: 1}[dtype]
    averaged = dc.average_gradients(mx.array([largest, 0, 1]).astype(dtype))
    assert averaged.dtype == mx.float32
    assert_tree_close(averaged, [np.array([largest, 0.0, 1.0])])


def test_averaging_works_inside_compile(world: dc.World) -> None:
    truth = mean64(several_types)
    compiled = mx.compile(dc.average_gradients)
    clip = mx.compile(lambda grads: dc.average_and_clip(grads, 0.5, nonfinite="zero"))
    for _ in range(2):
        assert_tree_close(compiled(several_types(world.rank)), truth)
        clipped, norm = clip(several_types(world.rank))
        # A mean that was rounded to bfloat16 has a norm a little off that of the exact mean.
        total = math.sqrt(sum(float(np.square(x).sum()) for x in truth))
        assert relative(norm, total) <= 1e-2
        assert_tree_close(clipped, [x * (0.5 / total) for x in truth], 3e-2)
        assert same_bits([clipped, norm])


@several
def test_a_tree_is_compared_over_the_ranks_once(world: dc.World, collectives: Counter[str]) -> None:
    grads = {"seen once": normal((3,), world.rank)}
    for gathers in (1, IN_FLIGHT, IN_FLIGHT):
        mx.eval(dc.average_gradients(grads))
        assert collectives["all_gather"] == gathers
        collectives.clear()
    _, messages = counted(collectives, lambda: dc.average_and_clip(grads, 1.0)[0])
    assert messages == 1 + ORDER
    assert collectives["all_gather"] == IN_FLIGHT


DIFFERENT: dict[str, tuple[Any, Any, str]] = {
    "a leaf too many": (
        {"p": mx.ones(3), "q": mx.ones(2)},
        {"p": mx.ones(3)},
        "q: float32 (2,) is on rank {0} and not",
    ),
    "a leaf missing": ({"s": mx.ones(3)}, {"s": mx.ones(3), "t": mx.ones(2)}, "t: float32 (2,) is on rank"),
    "another shape": ({"u": mx.ones((2, 3))}, {"u": mx.ones((3, 2))}, "u: float32 (2, 3) is on rank {0} and not"),
    "another type": ({"u": mx.ones(5, mx.bfloat16)}, {"u": mx.ones(5)}, "u: bfloat16 (5,) is on rank {0} and not"),
    "another name": ({"v": mx.ones(7)}, {"V": mx.ones(7)}, "v: float32 (7,) is on rank {0} and not"),
    "another order": ({"y": mx.ones(3), "x": mx.ones(2)}, {"x": mx.ones(2), "y": mx.ones(3)}, "in another order"),
}


@several
@pytest.mark.parametrize("both", [lambda g: dc.average_gradients(g), lambda g: dc.average_and_clip(g, 1.0)], ids="ac")
@pytest.mark.parametrize("name", DIFFERENT)
def test_trees_that_differ_are_named_on_every_rank(name: str, both: Any, world: dc.World) -> None:
    odd, other, said = DIFFERENT[name]
    for rank in (0, world.size - 1):
        with pytest.raises(dc.LayoutError) as error:
            both({name: odd if world.rank == rank else other})
        assert said.format(rank) in str(error.value)
        assert len(set(told_by_all(str(error.value)))) == 1


@several
def test_a_layout_that_contradicts_averaging_is_an_error() -> None:
    line()
    for layout in (dc.Sharded(), dc.Sharded("x"), {"w": dc.Sharded("x")}, lambda path, leaf: dc.Sharded()):
        with pytest.raises(dc.LayoutError, match="Leaf 'w' is called Sharded"):
            dc.average_and_clip({"w": mx.ones(3)}, 1.0, layout=layout)


# ----------------------------------------------------------------------------------------- average and clip


@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1e6, math.inf])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("name", ["one leaf", "nested", "an empty leaf", "transposed", "hundreds"])
def test_it_equals_averaging_then_clipping(name: str, norm_type: float, max_norm: float, world: dc.World) -> None:
    grads = PARTIALS[name](world.rank, mx.float32)
    clipped, norm = dc.average_and_clip(grads, max_norm, norm_type=norm_type)
    expected, expected_norm = dc.clip_grad_norm(
        dc.average_gradients(grads), max_norm, layout=dc.Replicated(), norm_type=norm_type
    )
    assert (norm.dtype, norm.shape) == (mx.float32, ())
    assert relative(norm, float(expected_norm)) <= 1e-6
    assert_tree_close(clipped, [wide(leaf) for leaf in leaves(expected)], 1e-6)
    assert same_bits([clipped, norm])


@pytest.mark.parametrize("dtype", [d for n, d in DTYPES.items() if n not in ("float32", "bool")], ids=str)
def test_every_type_is_averaged_and_clipped(dtype: mx.Dtype, world: dc.World) -> None:
    tree = PARTIALS["dict"]
    clipped, norm = dc.average_and_clip(tree(world.rank, dtype), 0.3)
    truth = mean64(lambda r: tree(r, dtype))
    total = math.sqrt(sum(float(np.square(np.abs(x)).sum()) for x in truth))
    assert relative(norm, total) <= (1e-6 if EPSILON.get(dtype, 0) < 1e-6 else 1e-3)
    assert {leaf.dtype for leaf in leaves(clipped)} == {dtype if mx.issubdtype(dtype, mx.inexact) else mx.float32}
    assert_tree_close(clipped, [x * (0.3 / total) for x in truth])
    assert same_bits([clipped, norm])


@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_it_equals_what_mlx_does_in_two_calls(max_norm: float, world: dc.World) -> None:
    grads = PARTIALS["dict"](world.rank, mx.float32)
    clipped, norm = dc.average_and_clip(grads, max_norm)
    expected, expected_norm = optim.clip_grad_norm(nn.average_gradients(grads, world.group), max_norm)
    assert relative(norm, float(expected_norm)) <= 1e-6
    assert_tree_close(clipped, [wide(leaf) for leaf in leaves(expected)], 1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_bad_value_on_one_rank_is_seen_by_all(value: float, world: dc.World) -> None:
    for bad in range(world.size):
        grads = {"v": normal((5,), world.rank), "w": [mx.array([1.0, value if world.rank == bad else 2.0])]}
        for policy in ("propagate", "zero"):
            clipped, norm = dc.average_and_clip(grads, 1.0, nonfinite=policy)
            assert not math.isfinite(norm.item())  # type: ignore[arg-type]
            if policy == "zero":
                assert powers64(clipped) == 0
        with pytest.raises(FloatingPointError) as error:
            dc.average_and_clip(grads, 1.0, nonfinite="raise")
        assert f"rank {bad}: 'w.0' (1 " in str(error.value)
        assert len(set(told_by_all(str(error.value)))) == 1


def test_the_callers_tree_is_not_changed(world: dc.World) -> None:
    grads = {"a": [normal((5,), world.rank)]}
    before = np.array(grads["a"][0])
    mx.eval(dc.average_gradients(grads), dc.average_and_clip(grads, 0.1)[0])
    assert np.array_equal(np.array(grads["a"][0]), before)


# ------------------------------------------------------------------------------------------------- on a mesh


def on_grid(rank: int) -> dict[str, Any]:
    """Partial over dp: shards over tp, and replicas over tp."""
    dp, tp = divmod(rank, 2)
    return {
        "shard": {"w": normal((20, 7), (dp, tp, 1)), "b": normal((3,), (dp, tp, 2), mx.bfloat16)},
        "replica": normal((11, 5), (dp, 9, 3)),
    }


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_data_parallel_over_tensor_parallel_is_the_truth(
    max_norm: float, norm_type: float, world: dc.World, collectives: Counter[str]
) -> None:
    mesh = square()
    layout = {"shard": dc.Sharded("tp"), "replica": dc.Replicated()}
    grads = on_grid(world.rank)
    options: Any = {"group": mesh.group("dp"), "layout": layout, "norm_type": norm_type}
    options["communication_dtype"] = mx.float32
    mx.eval(dc.average_and_clip(grads, max_norm, **options)[0])
    (clipped, norm), messages = counted(collectives, lambda: dc.average_and_clip(grads, max_norm, **options))
    if KERNEL and norm_type != math.inf:
        assert messages == 2 + ORDER  # shards and replicas together, and the norm
    else:
        assert messages == 3  # the leaves of bfloat16, those of float32, and the norm

    def mean_of(tp: int) -> list[Array]:
        both = (leaves(on_grid(tp)), leaves(on_grid(2 + tp)))
        return [(wide(a) + wide(b)) / 2 for a, b in zip(*both, strict=True)]

    means = [mean_of(tp) for tp in (0, 1)]
    whole = np.concatenate([x.reshape(-1) for x in [*means[0], *means[1][:2]]])
    truth = float(np.linalg.norm(whole, norm_type))
    assert relative(norm, truth) <= 1e-6
    assert same_bits(norm)
    mine = [x * min(1.0, max_norm / (truth + 1e-6)) for x in means[world.rank % 2]]
    assert_tree_close(clipped, mine)
    assert same_bits(clipped["replica"])
    averaged = dc.average_gradients(grads, mesh.group("dp"))
    assert_tree_close(averaged, means[world.rank % 2])


@pytest.mark.mpi(min_size=4)
def test_shards_over_the_averaged_axis_are_an_error() -> None:
    mesh = square()
    for layout in (dc.Sharded("dp"), dc.Sharded("dp", "tp"), dc.Sharded()):
        with pytest.raises(dc.LayoutError, match=r"'w' is called Sharded.* averaged over the axis dp"):
            dc.average_and_clip({"w": mx.ones(3)}, 1.0, group=mesh.group("dp"), layout=layout)


def test_an_axis_of_one_rank_may_be_named(world: dc.World) -> None:
    mesh = dc.Mesh(long=world.size, one=1)
    grads = {"w": mx.full((3,), 1.0 + world.rank)}
    averaged, norm = dc.average_and_clip(grads, 100.0, group=mesh.group("long"), layout=dc.Sharded("one"))
    mean = (1 + world.size) / 2
    assert relative(norm, mean * 3**0.5) <= 1e-6
    assert relative(averaged["w"][0], mean) <= 1e-6


@pytest.mark.parametrize("dtype", [mx.int8, mx.complex64, "bfloat16"], ids=str)
def test_gradients_are_sent_as_floating_numbers_only(dtype: Any) -> None:
    for call in (dc.average_gradients, lambda grads, **kwargs: dc.average_and_clip(grads, 1.0, **kwargs)):
        with pytest.raises(TypeError, match="communication_dtype should be a floating dtype"):
            call({"w": mx.ones(3)}, communication_dtype=dtype)
