"""check_layout: silent when the layout is right, and one error on all ranks, with names, when it is not."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import mlx.core as mx
import pytest
from reference import DTYPES, WORLD, leaves, line, norm64, normal, relative, several, square, told_by_all

import distclip as dc
from distclip import contradictions, digests

R, S = dc.Replicated(), dc.Sharded()
N = WORLD.size
ALL = ("rank " if N == 1 else "ranks ") + ", ".join(map(str, range(N)))


def complaint(grads: Any, layout: Any, **options: Any) -> str:
    """The error's text, which must be the same on every rank."""
    with pytest.raises(dc.LayoutError) as error:
        dc.check_layout(grads, layout, **options)
    text = str(error.value)
    assert text.startswith("The gradients contradict the layout:\n")
    assert len(set(told_by_all(text))) == 1
    return text


def mixed(rank: int, dtype: mx.Dtype = mx.float32) -> dict[str, Any]:
    return {"s": [normal((7, 5), rank, dtype), normal((4,), rank + 9, dtype)], "r": {"w": normal((6, 3), 70, dtype)}}


RIGHT: dict[str, tuple[Any, Any]] = {
    "shards": (mixed(WORLD.rank)["s"], S),
    "replicas": (mixed(WORLD.rank)["r"], R),
    "mixed": (mixed(WORLD.rank), {"s": S, "r": R}),
    "over an axis": (mixed(WORLD.rank), {"s": dc.Sharded("x"), "r": R}),
    "callable": (mixed(WORLD.rank), lambda path, leaf: S if path.startswith("s") else R),
    "uneven shards": (normal((5 + WORLD.rank, 3), WORLD.rank), S),
    "empty leaves": ([mx.zeros((0, 3)), mx.zeros((0,))], [S, R]),
    "zeros": ([mx.zeros((5,)), mx.zeros(())], [S, R]),
    "one tree per rank": ({f"stage{WORLD.rank}": normal((4, 4), 1)}, S),
    "rank 0 empty": ({} if WORLD.rank == 0 else {"w": normal((4,), WORLD.rank)}, S),
    "nothing": ({}, S),
    "0-d": ([normal((), WORLD.rank), normal((), 70)], [S, R]),
    "not finite": (
        [mx.array([math.nan, WORLD.rank]), mx.array([math.nan, math.inf])],
        [S, R],
    ),
    "none": ({"a": None, "s": normal((3,), WORLD.rank)}, S),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_layout_passes_with_one_collective(name: str, collectives: Counter[str]) -> None:
    line()
    grads, layout = RIGHT[name]
    dc.check_layout(grads, layout)
    assert collectives == {"all_gather": 1}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_type_can_be_checked(dtype: mx.Dtype, world: dc.World) -> None:
    with mx.stream(mx.cpu):
        dc.check_layout(mixed(world.rank, dtype), {"s": S, "r": R})
        if world.size > 1:
            assert "r.w: called Sharded(), but" in complaint(mixed(world.rank, dtype), S)
            assert "s.0: called Replicated(), but" in complaint(mixed(world.rank, dtype), R)


def test_a_transposed_leaf_is_equal_to_its_copy() -> None:
    leaf = normal((30, 20), 1)
    dc.check_layout({"w": leaf.T if WORLD.rank == 0 else mx.contiguous(leaf.T)}, R)


@several
def test_replicas_called_sharded_are_named(world: dc.World) -> None:
    """The layout that makes the norm too large by the root of the ranks."""
    grads = mixed(world.rank)["r"]
    assert relative(dc.global_norm(grads, layout=S), norm64(grads) * math.sqrt(N)) <= 1e-6
    text = complaint(grads, S)
    assert f"w: called Sharded(), but {ALL} hold the same values; call it Replicated()" in text
    assert "s.0" not in text


@several
@pytest.mark.parametrize("at", [1e-30, 1e-15, 1e15, 1e30])
def test_replicas_called_sharded_are_named_at_any_magnitude(at: float) -> None:
    assert f"the array: called Sharded(), but {ALL} hold the same values" in complaint(normal((50,), 1, at=at), S)


@several
def test_shards_called_replicas_are_named(world: dc.World) -> None:
    text = complaint(mixed(world.rank), R)
    assert f"s.0: called Replicated(), but its copies differ on {ALL}" in text
    assert "s.1: called Replicated()" in text
    assert "r.w" not in text


@several
@pytest.mark.parametrize("bad", range(N))
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float64])
def test_a_drift_of_one_bit_is_found(dtype: mx.Dtype, bad: int, world: dc.World) -> None:
    leaf = normal((41, 13), 1, dtype)
    if world.rank == bad:
        width = {2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[leaf.itemsize]
        bits = leaf.view(width)
        bits[17, 5] = bits[17, 5] ^ mx.array(1, width)
        leaf = bits.view(dtype)
    text = complaint({"still": normal((3,), 2), "moved": leaf}, R)
    assert f"moved: called Replicated(), but its copies differ on {ALL}" in text
    assert f"rank {bad} with norm" in text
    assert "still" not in text


@several
def test_two_values_that_changed_places_are_found(world: dc.World) -> None:
    leaf = normal((100,), 1)
    if world.rank == N - 1:
        leaf[3], leaf[90] = leaf[90].item(), leaf[3].item()
    assert f"its copies differ on {ALL}" in complaint(leaf, R)


@several
@pytest.mark.parametrize("bad", sorted({0, N - 1}))
def test_a_replica_missing_on_one_rank_is_named(bad: int, world: dc.World) -> None:
    grads = mixed(world.rank)
    if world.rank == bad:
        del grads["r"]["w"]
    text = complaint(grads, {"s": S, "r": R})
    assert f"r.w: called Replicated(), but it is missing on rank {bad}, while " in text
    assert "s.0" not in text


@several
@pytest.mark.parametrize(
    ("odd", "other", "said"),
    [
        (mx.ones((2, 3)), mx.ones((3, 2)), "float32 (2, 3) on rank 0, float32 (3, 2) on rank 1"),
        (mx.ones(4, mx.bfloat16), mx.ones(4), "bfloat16 (4,) on rank 0, float32 (4,) on rank 1"),
        (mx.zeros(4), mx.zeros(5), "float32 (4,) on rank 0, float32 (5,) on rank 1"),
    ],
)
def test_copies_of_different_shapes_or_types_are_named(odd: mx.array, other: mx.array, said: str) -> None:
    text = complaint({"w": odd if WORLD.rank == 0 else other}, R)
    assert f"w: called Replicated(), but its copies have different shapes or types: {said}" in text


@several
def test_different_placements_of_a_leaf_are_named(world: dc.World) -> None:
    text = complaint(mixed(world.rank), {"s": S, "r": R if world.rank == 0 else S})
    assert "r.w: called Replicated() on rank 0, Sharded() on rank 1" in text
    assert "but a leaf has one placement; give every rank the same layout" in text


@several
def test_a_rank_without_shards_would_miss_the_collective(world: dc.World) -> None:
    """Where a callable calls all of one rank's leaves replicated, the norm would wait for that rank for ever."""
    grads = {"r": normal((5,), 70)}
    if world.rank != 0:
        grads["s"] = normal((4,), world.rank)
    dc.check_layout(grads, {"r": R, "s": S})  # a tree says it for the rank that holds no shard
    text = complaint(grads, lambda path, leaf: S if path == "s" else R)
    assert "rank 0: everything is called replicated there" in text
    assert f"rank{'s' if N > 2 else ''} {', '.join(map(str, range(1, N)))} would wait in one" in text


@several
def test_a_rank_that_calls_all_replicated_is_named(world: dc.World) -> None:
    text = complaint(mixed(world.rank), R if world.rank == N - 1 else {"s": S, "r": R})
    assert f"rank {N - 1}: everything is called replicated there" in text
    assert "but a leaf has one placement; give every rank the same layout" in text


@several
def test_many_wrong_leaves_are_counted(world: dc.World) -> None:
    text = complaint({f"w{i:02}": normal((3,), i) for i in range(30)}, S)
    assert "w09" in text
    assert "w10" not in text
    assert text.endswith("  and 20 more: error.leaves has all 30")


@several
def test_the_error_has_a_record_of_every_wrong_leaf() -> None:
    grads = {f"w{i:02}": normal((3,), i) for i in range(18)}
    with pytest.raises(dc.LayoutError, match=r"error\.leaves has all 18") as error:
        dc.check_layout({**grads, "right": normal((3,), (WORLD.rank, 3))}, S)
    assert [leaf.path for leaf in error.value.leaves] == sorted(grads)
    last = error.value.leaves[-1]
    assert (last.called, last.seen) == ("Sharded()", f"{ALL} hold the same values")
    assert last.advice == "call it Replicated()"
    assert f"  {error.value.leaves[0]}" in str(error.value).splitlines()


def test_equal_leaves_of_a_single_value_are_not_judged() -> None:
    dc.check_layout([mx.ones((5,)), mx.zeros((3, 3)), mx.array(2.0), mx.full((2,), 1j)], S)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_slices_of_a_leaf_are_digested_as_the_whole(dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with mx.stream(mx.cpu):
        leaf = normal((1000,), 1, dtype)
        whole = digests.Values.of(leaf)
        monkeypatch.setattr(digests, "SLICE", 300)
        sliced = digests.Values.of(leaf)
    assert sliced[:3] == whole[:3]
    assert sliced.norm == pytest.approx(norm64(leaf), rel=1e-5)


@pytest.mark.parametrize("count", [1024, 1025, 1500])
def test_a_tree_of_many_leaves_is_checked_whole(count: int, world: dc.World, collectives: Counter[str]) -> None:
    on_rank_0 = {f"w{i}": mx.array([float(world.rank + 1), i]) for i in range(count)}
    grads = on_rank_0 if world.rank == 0 else {"w0": on_rank_0["w0"], f"w{count - 1}": on_rank_0[f"w{count - 1}"]}
    dc.check_layout(grads, S)
    assert collectives == {"all_gather": 1 if count <= 1024 else 2}
    if world.size > 1:
        grads[f"w{count - 1}"] = mx.array([5.0, 6.0])
        text = complaint(grads, S)
        assert f"w{count - 1}: called Sharded(), but {ALL} hold the same values" in text
        assert len(text.splitlines()) == 2


def test_the_check_changes_nothing(world: dc.World) -> None:
    grads = mixed(world.rank)
    before = leaves(grads)
    dc.check_layout(grads, {"s": S, "r": R})
    assert all(a is b for a, b in zip(before, leaves(grads), strict=True))


# ------------------------------------------------------------------------------- contributions, batches and drift


@several
@pytest.mark.parametrize("share", [1e-7, 5e-4])
def test_copies_that_are_almost_equal_have_drifted_apart(share: float, world: dc.World) -> None:
    leaf = normal((500,), 1) * (1 + share * (world.rank == 0))
    text = complaint({"w": leaf, "v": normal((5,), 2)}, R)
    assert "the copies drifted apart, by less than 0.001 of their norm" in text
    assert "Partial" not in text


@several
def test_copies_of_one_norm_need_not_be_almost_equal(world: dc.World) -> None:
    leaf = normal((500,), 1)
    assert "drifted" not in complaint({"w": leaf if world.rank == 0 else leaf[::-1]}, R)


@several
def test_one_leaf_alone_may_be_a_contribution_or_of_another_batch(
    world: dc.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contradictions, "MESHES", [line()])  # of those that the tests made, it names the last
    text = complaint({"w": normal((6,), world.rank)}, R)
    assert "sum it over x (call it Partial('x')) if the ranks along x take the same batch, average the" in text
    assert text.endswith("call it Sharded('x') if they are blocks")


@several
def test_gradients_that_nobody_averaged_are_called_so(world: dc.World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contradictions, "MESHES", [line()])
    text = complaint([normal((6,), (world.rank, i)) for i in range(3)] + [mx.ones(9)], R)
    assert "the ranks along x agree on no leaf: average the gradients over x if they take different batches" in text


@several
def test_contributions_are_summed_and_not_averaged(world: dc.World) -> None:
    """As q_norm beside replicas that the ranks along tp agree on: their mean is half of the true gradient."""
    line()
    grads = {"q_norm": normal((8,), world.rank), "embed": normal((6, 3), 99), "up": normal((4, 3), (world.rank, 1))}
    layout = {"q_norm": R, "embed": R, "up": dc.Sharded("x")}
    text = complaint(grads, layout)
    assert "the ranks along x agree on other leaves, so do not average: sum it over x (call it Partial('x'))" in text
    dc.check_layout(grads, {**layout, "q_norm": dc.Partial("x")})


@pytest.mark.mpi(min_size=4)
def test_each_axis_along_which_copies_differ_has_its_advice(world: dc.World) -> None:
    """Before the average over dp: all leaves differ along dp, contributions along tp too."""
    square()
    dp, tp = divmod(world.rank, 2)
    grads = {"q_norm": normal((8,), (dp, tp)), "embed": normal((6, 3), (dp, 9)), "up": normal((4, 3), (dp, tp, 1))}
    layout = {"q_norm": R, "embed": R, "up": dc.Sharded("tp")}
    with pytest.raises(dc.LayoutError) as error:
        dc.check_layout(grads, layout)
    advice = {leaf.path: leaf.advice for leaf in error.value.leaves}
    averaged = "the ranks along dp agree on no leaf: average the gradients over dp"
    assert advice["embed"].startswith(averaged)
    assert "tp" not in advice["embed"]
    assert averaged in advice["q_norm"]
    assert "the ranks along tp agree on other leaves, so do not average: sum it over tp" in advice["q_norm"]
    assert advice["up"].startswith("average the gradients over dp if the ranks along dp take different batches")
    averaged_grads = dc.average_gradients(grads, group=square().group("dp"))
    dc.check_layout(averaged_grads, {**layout, "q_norm": dc.Partial("tp")})


# ---------------------------------------------------------------------------------- leaves that some ranks hold

ENDS = (0, N - 1)


def tied(rank: int) -> dict[str, mx.array]:
    """The gradients of a pipeline stage; the first and the last share the embedding, and have summed its gradient."""
    stage = {"stage": normal((4, 3), rank)}
    return {**stage, "embed": normal((5, 3), 99)} if rank in ENDS else stage


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("called", [S, {"stage": S, "embed": R}], ids=["sharded", "replicated"])
def test_tied_weights_lead_to_the_layout_that_counts_them_once(called: Any, world: dc.World) -> None:
    grads = tied(world.rank)
    with pytest.raises(dc.LayoutError) as error:
        dc.check_layout(grads, called)
    (leaf,) = error.value.leaves
    assert leaf.path == "embed"
    assert leaf.advice.startswith(f"call it Replicated(ranks={ENDS}) if these ranks alone hold it")
    layout = {"stage": S, "embed": dc.Replicated(ranks=ENDS)}
    dc.check_layout(grads, layout)
    expected = norm64([normal((4, 3), rank) for rank in range(N)] + [normal((5, 3), 99)])
    assert relative(dc.global_norm(grads, layout=layout), expected) <= 1e-6


@pytest.mark.mpi(min_size=3)
def test_a_tied_leaf_that_is_missing_or_differs_is_named(world: dc.World) -> None:
    layout = {"stage": S, "embed": dc.Replicated(ranks=ENDS)}
    grads = tied(world.rank)
    if world.rank == 0:
        del grads["embed"]
    text = complaint(grads, layout)
    assert f"embed: called Replicated(ranks={ENDS}), but it is missing on rank 0, while rank {N - 1} holds a" in text
    grads = tied(world.rank)
    if world.rank == N - 1:
        grads["embed"] = normal((5, 3), 7)
    assert f"embed: called Replicated(ranks={ENDS}), but its copies differ on ranks 0, {N - 1}" in complaint(
        grads, layout
    )


# ------------------------------------------------------------------------------------------------ on a mesh

GRID: dict[str, Any] = {
    "dp": dc.Sharded("dp"),
    "tp": dc.Sharded("tp"),
    "both": dc.Sharded("dp", "tp"),
    "all": S,
    "neither": R,
}


def on_grid(rank: int) -> dict[str, mx.array]:
    dp, tp = divmod(rank, 2)
    place = {"dp": (dp, 9), "tp": (9, tp), "both": (dp, tp), "all": (dp, tp), "neither": (9, 9)}
    return {name: normal((6, 7), (i, *place[name])) for i, name in enumerate(GRID)}


@pytest.mark.mpi(min_size=4)
def test_a_right_layout_on_a_mesh_passes(world: dc.World, collectives: Counter[str]) -> None:
    square()
    dc.check_layout(on_grid(world.rank), GRID)
    assert collectives == {"all_gather": 1}


SAME_0_1 = "ranks 0, 1 hold the same values"
WRONG: dict[str, tuple[str, Any, list[str]]] = {
    "dp as tp": (
        "dp",
        dc.Sharded("tp"),
        ["dp: called Sharded('tp'), but its copies differ on ranks 0, 2", SAME_0_1, "call it Sharded('dp')"],
    ),
    "tp as both": (
        "tp",
        dc.Sharded("dp", "tp"),
        ["ranks 0, 2 hold the same values", "ranks 1, 3 hold the same values; call it Sharded('tp')"],
    ),
    "dp as both": ("dp", dc.Sharded("dp", "tp"), [SAME_0_1, "ranks 2, 3 hold the same values"]),
    "both as tp": ("both", dc.Sharded("tp"), ["its copies differ on ranks 0, 2", "its copies differ on ranks 1, 3"]),
    "neither as dp": ("neither", dc.Sharded("dp"), ["ranks 0, 1, 2, 3 hold the same values"]),
    "tp as neither": ("tp", R, ["its copies differ on ranks 0, 1, 2, 3"]),
}


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_axis_is_named_with_its_ranks(name: str, world: dc.World) -> None:
    square()
    leaf, placement, said = WRONG[name]
    text = complaint(on_grid(world.rank), GRID | {leaf: placement})
    assert all(part in text for part in said), text
    assert all(f"  {other}:" not in text for other in GRID if other != leaf)


@pytest.mark.mpi(min_size=4)
def test_a_copy_of_a_shard_that_is_missing_is_named(world: dc.World) -> None:
    square()
    grads = on_grid(world.rank)
    if world.rank == 3:
        del grads["tp"]
    assert "tp: called Sharded('tp'), but it is missing on rank 3, while rank 1 holds a copy" in complaint(grads, GRID)


@pytest.mark.mpi(min_size=4)
def test_a_group_is_checked_by_itself(world: dc.World) -> None:
    group = square().group("tp")
    leaf = normal((5,), world.rank // 2)  # the same within tp
    dc.check_layout({"w": leaf}, R, group=group)
    with pytest.raises(dc.LayoutError, match=r"w: called Sharded.* ranks 0, 1 hold the same values"):
        dc.check_layout({"w": leaf}, dc.Sharded("tp"), group=group)
