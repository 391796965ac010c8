"""sum_scatter on MPI and the ring, by an all-sum and by an exchange in pairs, and the modules that need it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from launching import under_mpirun
from mlx.utils import tree_flatten, tree_map
from reference import EPSILON, FLOATS, WORLD, Array, line, normal, several, square

import distclip as dc
from distclip import scatter

N, RANK = WORLD.size, WORLD.rank
LARGE = scatter.EXCHANGE_FROM_BYTES  # values of one block, of any type: enough for an exchange


@pytest.fixture(params=["all-sum", "exchange"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks of any size are summed in this manner. The ring always has the all-sum."""
    monkeypatch.setattr(scatter, "EXCHANGE_FROM_BYTES", {"all-sum": 2**60, "exchange": 0}[request.param])
    return str(request.param)


def of_rank(rank: int, shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
    """What a rank brings: shape (N rows, ...)."""
    return normal((N * shape[0], *shape[1:]), (7, rank), dtype)


def block64(shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> Array:
    """This rank's block of the sum, in float64."""
    total = sum(np.array(of_rank(rank, shape, dtype).astype(mx.float64, stream=mx.cpu)) for rank in range(N))
    return np.asarray(total)[RANK * shape[0] : (RANK + 1) * shape[0]]


def assert_close(block: mx.array, expected: Array, dtype: mx.Dtype = mx.float32) -> None:
    """As close as N roundings allow, of partial sums of up to 4 sqrt(N)."""
    assert (block.shape, block.dtype) == (expected.shape, dtype)
    values = np.array(block.astype(mx.float64, stream=mx.cpu))
    np.testing.assert_allclose(values, expected, rtol=0, atol=8 * N * EPSILON[dtype])


# ------------------------------------------------------------------------------------------------------ the sum


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("group", [WORLD.group, None], ids=["world", "none"])
def test_a_rank_gets_its_block_of_the_sum(
    group: mx.distributed.Group | None, shape: tuple[int, ...], dtype: mx.Dtype, how: str
) -> None:
    block = mx.distributed.sum_scatter(of_rank(RANK, shape, dtype), group=group)
    assert_close(block, block64(shape, dtype), dtype)


def test_whole_numbers_are_summed_exactly(how: str) -> None:
    whole = mx.arange(6 * N).reshape(-1, 2)
    block = mx.distributed.sum_scatter(whole + RANK)
    assert block.tolist() == (N * whole + sum(range(N)))[3 * RANK : 3 * (RANK + 1)].tolist()


def test_arrays_that_lie_transposed_are_summed(how: str) -> None:
    x = mx.contiguous(of_rank(RANK, (3, 5)).T).T
    assert_close(mx.distributed.sum_scatter(x), block64((3, 5)))


def test_every_call_gives_the_same_bits(how: str) -> None:
    x = of_rank(RANK, (50, 7))
    first, *others = [np.array(mx.distributed.sum_scatter(x)) for _ in range(3)]
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.mpi(min_size=4)
def test_sub_groups_of_a_mesh_sum_among_themselves(how: str) -> None:
    for name in ("dp", "tp"):
        rank = square().coordinates()[name]
        x = mx.array([10.0, 20.0]) + rank + 100 * RANK
        block = mx.distributed.sum_scatter(x, group=square().group(name))
        partner = RANK ^ (2 if name == "dp" else 1)
        assert block.tolist() == [2 * (10.0 + 10 * rank) + 1 + 100 * (RANK + partner)]


@pytest.mark.mpi(min_size=3)
def test_a_group_with_the_ranks_in_another_order_has_its_own_pairs(how: str) -> None:
    x = of_rank(RANK, (3, 5))
    mx.eval(mx.distributed.sum_scatter(x))
    backwards = WORLD.group.split(0, N - 1 - RANK)
    for _ in range(2):
        block = mx.distributed.sum_scatter(x, group=backwards)
        total = sum(np.array(of_rank(rank, (3, 5)), np.float64) for rank in range(N))
        first = 3 * backwards.rank()
        assert_close(block, np.asarray(total)[first : first + 3])


@several
def test_an_axis_that_the_ranks_do_not_divide_is_refused() -> None:
    for shape in ((N + 1, 2), ()):
        with pytest.raises(ValueError, match=rf"{N} ranks divide.*\({', '.join(map(str, shape))}"):
            mx.distributed.sum_scatter(mx.zeros(shape), group=WORLD.group)


# ------------------------------------------------------------------------------------------------- the exchange


@pytest.mark.parametrize("n", range(2, 12))
def test_every_two_ranks_meet_once(n: int) -> None:
    rounds = list(zip(*(scatter.partners_of(rank, n) for rank in range(n)), strict=True))
    assert len(rounds) == n - 1 + n % 2
    met: Counter[tuple[int, int]] = Counter()
    for partners in rounds:
        assert all(partners[partner] == rank for rank, partner in enumerate(partners))
        assert sum(partner == rank for rank, partner in enumerate(partners)) == n % 2
        met.update((rank, partner) for rank, partner in enumerate(partners) if rank < partner)
    assert met == Counter(combinations(range(n), 2))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("rows", "sums", "gathers"), [(LARGE, 0, N - 1), (1, 1, 0)], ids=["large", "small"])
def test_large_blocks_are_exchanged_and_small_ones_summed(
    rows: int, sums: int, gathers: int, collectives: Counter[str]
) -> None:
    x = mx.zeros((N * rows,))
    mx.distributed.sum_scatter(x)  # may make the pairs
    collectives.clear()
    mx.eval(mx.distributed.sum_scatter(x))
    assert (collectives["all_sum"], collectives["all_gather"]) == (sums, gathers)


@pytest.mark.mpi(min_size=2)
def test_the_pairs_of_the_same_ranks_are_made_once() -> None:
    sum_scatter = scatter.SumScatter(WORLD.group, lambda: WORLD.stream, True)
    made: set[int] = set()
    for group in (None, mx.distributed.init(), line().group("x"), WORLD.group.split(0)):
        mx.eval(sum_scatter(mx.zeros((N * LARGE,)), group=group))
        (pairs,) = sum_scatter._pairs.values()
        made.add(id(pairs))
    assert len(made) == 1


@several
def test_several_sums_and_averages_in_an_evaluation_keep_to_one_order(how: str) -> None:
    """All in one graph, which MLX orders by its shape: if it differed between ranks, they would wait for ever."""
    shapes = [(k, 5) for k in range(1, 9)]
    blocks = [mx.distributed.sum_scatter(of_rank(RANK, shape)) for shape in shapes]
    chained = mx.distributed.sum_scatter(mx.distributed.all_gather(blocks[3] / N))
    mean = dc.average_gradients({"x": blocks[2].sum()})
    mx.eval(mean, chained, blocks[::-1])
    for shape, block in zip(shapes, blocks, strict=True):
        assert_close(block, block64(shape))
    assert_close(chained, block64(shapes[3]))


@pytest.mark.parametrize("name", [None, "given"])
@several
def test_a_sum_runs_on_the_stream_of_the_world_unless_another_is_given(
    name: str | None, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[mx.Stream] = []
    for collective in ("all_sum", "all_gather"):
        original = getattr(mx.distributed, collective)

        def noted(*args: Any, original: Any = original, **kwargs: Any) -> mx.array:
            used.append(kwargs["stream"])
            result: mx.array = original(*args, **kwargs)
            return result

        monkeypatch.setattr(mx.distributed, collective, noted)
    other = mx.new_stream(mx.cpu)
    mx.synchronize(WORLD.stream)
    with mx.stream(other):
        block = mx.distributed.sum_scatter(of_rank(RANK, (3, 5)), stream=None if name is None else other)
        mx.eval(block)
        mx.synchronize(other)
    assert used
    assert all(stream == (WORLD.stream if name is None else other) for stream in used)
    assert_close(block, block64((3, 5)))


def test_a_compiled_sum_has_the_bits_of_an_eager_one(how: str) -> None:
    group = line().group("x")
    compiled = mx.compile(lambda x: mx.distributed.sum_scatter(2 * x, group=group) + 1)
    x = of_rank(RANK, (40, 3))
    first, second = compiled(x), compiled(x)  # the first may make the pairs, while it is traced
    expected = np.array(mx.distributed.sum_scatter(2 * x, group=group) + 1)
    np.testing.assert_array_equal(np.array(first), expected)
    np.testing.assert_array_equal(np.array(second), expected)


def test_the_gradient_is_that_of_the_rank_s_own_block(how: str) -> None:
    """As through MLX's all_sum, each rank differentiates what it brings itself."""
    x, weights = of_rank(RANK, (3, 5)), normal((3, 5), 9)
    gradient = mx.grad(lambda x: (mx.distributed.sum_scatter(x) * weights).sum())(x)
    expected = np.zeros(x.shape, np.float32)
    expected[3 * RANK : 3 * (RANK + 1)] = np.array(weights)
    np.testing.assert_array_equal(np.array(gradient), expected)


# --------------------------------------------------------------------------------------------------- fully_shard


def small_model() -> nn.Module:
    mx.random.seed(7)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 24))


def loss_of(model: nn.Module, x: mx.array) -> mx.array:
    return mx.square(model(x)).mean()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_fully_sharded_module_trains_as_the_whole_one_does(compiled: bool, how: str) -> None:
    """Every rank has its own data; the gradient of the whole model is the mean over the ranks."""
    data = [mx.random.normal((4, 5), key=mx.random.key(rank)) for rank in range(N)]
    whole, sharded = small_model(), small_model()
    mx.eval(whole.parameters())
    for i in (0, 2):
        sharded.layers[i] = nn.fully_shard(sharded.layers[i], group=WORLD.group)

    for_whole, for_sharded = optim.SGD(0.5), optim.SGD(0.5)
    for_sharded.init(sharded.trainable_parameters())
    state = [sharded.state, for_sharded.state]

    def step(x: mx.array) -> None:
        for_sharded.update(sharded, nn.value_and_grad(sharded, partial(loss_of, sharded))(x)[1])

    sharded_step = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for _ in range(3):
        per_rank = [nn.value_and_grad(whole, partial(loss_of, whole))(x)[1] for x in data]
        for_whole.update(whole, tree_map(lambda *each: sum(each[1:], each[0]) / N, per_rank[0], *per_rank[1:]))
        sharded_step(data[RANK])
    shard_of = {path.replace(".module", ""): np.array(leaf) for path, leaf in leaves(sharded.parameters()).items()}
    assert shard_of.keys() == leaves(whole.parameters()).keys()
    for path, full in leaves(whole.parameters()).items():
        rows = full.shape[0] // N
        expected = np.array(full[RANK * rows : (RANK + 1) * rows])
        np.testing.assert_allclose(shard_of[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


def leaves(tree: Any) -> dict[str, mx.array]:
    return tree_flatten(tree, destination={})  # type: ignore[return-value]


@pytest.mark.launches
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("steps", [0, 2], ids=["before the pairs are made", "later"])
def test_a_rank_that_fails_ends_the_others_in_their_exchange(steps: int, n: int, tmp_path: Path) -> None:
    program = f"""
        import distclip as dc
        import mlx.core as mx
        world = dc.init()
        x = mx.ones((world.size * {LARGE},))
        for step in range({steps} + 1):
            if world.rank == 1 and step == {steps}:
                raise ValueError("this rank fails")
            mx.eval(mx.distributed.sum_scatter(x))
        print("never here", flush=True)
    """
    ended = under_mpirun(n, program, tmp_path)
    assert ended.code != 0
    assert "this rank fails" in ended.output
    assert "never here" not in ended.output
