"""Layouts: what a placement means for the ranks, how a tree is given one, and how a model's is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_flatten, tree_map
from reference import WORLD, line, norm64, normal, relative, several, square

import distclip as dc
from distclip.layout import agreeing, blocks, copies
from distclip.layout import placements as placements_of
from distclip.mesh import MESHES
from distclip.tree import Leaves

N = WORLD.size
R, S = dc.Replicated(), dc.Sharded()
GRADS = {"a": mx.ones(1), "b": [mx.ones(2), {"c": mx.ones(3), "d": mx.ones(4)}], "e": (mx.ones(5),)}


def placements(grads: Any, layout: Any) -> list[Any]:
    return placements_of(Leaves(grads), layout)


# --------------------------------------------------------------------------------------- a tree's placements

LAYOUTS: dict[str, tuple[Any, list[Any]]] = {
    "one for all": (S, [S, S, S, S, S]),
    "prefixes": ({"a": R, "b": S, "e": R}, [R, S, S, S, R]),
    "lists": ({"a": R, "b": [R, S], "e": [S]}, [R, R, S, S, S]),
    "leaf by leaf": ({"a": S, "b": [R, {"c": S, "d": R}], "e": (S,)}, [S, R, S, R, S]),
    "more than the tree": ({"a": R, "b": [R, S, R], "e": [S, R], "z": S}, [R, R, S, S, S]),
    "callable on paths": (lambda path, leaf: S if path.startswith("b.1") else R, [R, R, S, S, R]),
    "callable on arrays": (lambda path, leaf: S if leaf.size > 3 else R, [R, R, R, S, S]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_leaf_gets_its_placement(name: str) -> None:
    layout, expected = LAYOUTS[name]
    assert placements(GRADS, layout) == expected


def test_a_callable_sees_dotted_paths() -> None:
    seen: list[tuple[str, int]] = []

    def note(path: str, leaf: mx.array) -> dc.Replicated:
        seen.append((path, leaf.size))
        return R

    placements(GRADS, note)
    assert seen == [("a", 1), ("b.0", 2), ("b.1.c", 3), ("b.1.d", 4), ("e.0", 5)]


def test_none_and_empty_parts_need_no_placement() -> None:
    grads: Any = {"a": None, "b": {"c": []}, "d": mx.ones(1), "e": [None, mx.ones(1)]}
    assert placements(grads, {"d": R, "e": S}) == [R, S]
    assert placements(grads, {"d": R, "e": {1: S}}) == [R, S]
    assert placements(grads, lambda path, leaf: S) == [S, S]
    assert placements({}, {}) == placements(None, R) == placements([], lambda path, leaf: S) == []


def test_a_single_array_has_a_placement() -> None:
    assert placements(mx.ones(3), S) == placements(mx.ones(3), lambda path, leaf: S) == [S]


@pytest.mark.parametrize(
    ("layout", "path"),
    [({"a": R, "b": S}, "e"), ({"a": R, "b": [R], "e": S}, "b.1"), ({"a": R, "b": [R, {"c": R}], "e": S}, "b.1.d")],
)
def test_a_leaf_without_placement_is_named(layout: Any, path: str) -> None:
    for call in (lambda: placements(GRADS, layout), lambda: dc.global_norm(GRADS, layout=layout)):
        with pytest.raises(dc.LayoutError, match=f"has no placement for '{path}'"):
            call()


@pytest.mark.parametrize("wrong", ["tp", None, 0, dc.Sharded], ids=str)
def test_what_is_no_placement_is_named(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"layout of leaf 'b\.0'"):
        placements({"b": [mx.ones(1)]}, {"b": [wrong] if not callable(wrong) else [object]})
    with pytest.raises(TypeError, match=r"layout of leaf 'b\.0' .* must be Sharded"):
        placements({"b": [mx.ones(1)]}, lambda path, leaf: wrong)


@pytest.mark.parametrize("kind", [dc.Sharded, dc.Replicated])
def test_the_class_in_place_of_an_instance_is_named(kind: type) -> None:
    with pytest.raises(TypeError, match=f"pass an instance, {kind.__name__}\\(\\)"):
        dc.global_norm({"w": mx.ones(3)}, layout=kind)


def test_sharded_takes_names_only() -> None:
    with pytest.raises(TypeError, match="names of mesh axes"):
        dc.Sharded(2)  # type: ignore[arg-type]
    assert repr(dc.Sharded("dp", "tp")) == "Sharded('dp', 'tp')"
    assert dc.Sharded("tp") == dc.Sharded("tp") != dc.Sharded()
    assert len({dc.Sharded("tp"), dc.Sharded("tp"), R, dc.Replicated()}) == 2


def test_only_shards_communicate(world: dc.World) -> None:
    group = world.group
    all_ranks = group if N > 1 else None
    assert agreeing(R, [R, R], group) is None
    assert agreeing({"a": R}, [R], group) is None
    assert agreeing(R, [], group) is None
    assert agreeing({"a": R, "b": S}, [R, S], group) is all_ranks
    assert agreeing({}, [], group) is all_ranks  # an empty rank takes part


# ------------------------------------------------------------------------------------- who holds which block


def test_blocks_on_a_line(world: dc.World) -> None:
    line()
    for sharded in (S, dc.Sharded("x")):
        assert blocks(sharded, world.group) == list(range(N))
        assert copies(sharded, world.group) == 1
    assert blocks(R, world.group) == [0] * N
    assert copies(R, world.group) == N


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (R, [0, 0, 0, 0]),
        (S, [0, 1, 2, 3]),
        (dc.Sharded("dp"), [0, 0, 1, 1]),
        (dc.Sharded("tp"), [0, 1, 0, 1]),
        (dc.Sharded("dp", "tp"), [0, 1, 2, 3]),
        (dc.Sharded("tp", "dp"), [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_blocks_on_a_square(placement: Any, expected: list[int], world: dc.World) -> None:
    square()
    assert blocks(placement, world.group) == expected
    assert copies(placement, world.group) == 4 // len(set(expected))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("axis", ["dp", "tp"])
def test_blocks_within_a_group_of_the_mesh(axis: str) -> None:
    mesh, other = square(), {"dp": "tp", "tp": "dp"}[axis]
    assert blocks(dc.Sharded(axis), mesh.group(axis)) == [0, 1]
    assert blocks(dc.Sharded(), mesh.group(axis)) == [0, 1]
    assert blocks(dc.Sharded("dp", "tp"), mesh.group(axis)) == [0, 1]
    assert blocks(dc.Sharded(other), mesh.group(axis)) == [0, 0]


def test_an_unknown_axis_is_an_error(world: dc.World) -> None:
    line()
    with pytest.raises(dc.LayoutError, match=r"Sharded\('nowhere'\) names mesh axes, but no mesh"):
        blocks(dc.Sharded("nowhere"), world.group)
    with pytest.raises(dc.LayoutError, match="no mesh of this program has them"):
        dc.global_norm(mx.ones(3), layout=dc.Sharded("nowhere"))
    with pytest.raises(ValueError, match="has no axis 'nowhere'"):
        blocks(dc.Sharded("nowhere", mesh=line()), world.group)


@contextmanager
def meshes_of_this_test() -> Iterator[None]:
    before = list(MESHES)
    yield
    MESHES[:] = before


@several
def test_an_axis_of_two_meshes_must_say_which(world: dc.World) -> None:
    with meshes_of_this_test():
        one, all_ranks = dc.Mesh(p=1, q=N), dc.Mesh(p=N)
        with pytest.raises(dc.LayoutError, match=r"could mean any of Mesh\(p=1, q=\d\), Mesh\(p=\d\)"):
            blocks(dc.Sharded("p"), world.group)
        assert blocks(dc.Sharded("p", mesh=one), world.group) == [0] * N
        assert blocks(dc.Sharded("p", mesh=all_ranks), world.group) == list(range(N))
        assert blocks(dc.Sharded("q"), world.group) == list(range(N))
        norm = dc.global_norm(normal((9,), 1), layout=dc.Sharded("p", mesh=one))
        assert relative(norm, norm64(normal((9,), 1))) <= 1e-6


@pytest.mark.mpi(min_size=4)
def test_equal_meshes_share_their_groups_and_turned_ones_are_a_question(world: dc.World) -> None:
    if world.size != 4:
        return
    with meshes_of_this_test():
        first, _ = dc.Mesh(u=2, v=2), dc.Mesh(u=2, v=2)
        assert blocks(dc.Sharded("v"), first.group("v")) == [0, 1]
        dc.Mesh(v=2, u=2)
        with pytest.raises(dc.LayoutError, match="could mean any of"):
            blocks(dc.Sharded("v"), world.group)


@several
def test_meshes_that_agree_on_an_axis_are_no_question(world: dc.World) -> None:
    with meshes_of_this_test():
        dc.Mesh(p=N)
        dc.Mesh(p=N, q=1)
        assert blocks(dc.Sharded("p"), world.group) == list(range(N))


@pytest.mark.mpi(min_size=4)
def test_a_group_the_mesh_did_not_make_is_an_error(world: dc.World) -> None:
    square()
    group = world.group.split(world.rank % 2)
    with pytest.raises(dc.LayoutError, match=r"Sharded\('tp'\) names axes of Mesh\(dp=2, tp=2\), but the group is not"):
        blocks(dc.Sharded("tp"), group)
    assert blocks(dc.Sharded(), group) == [0, 1]


# ----------------------------------------------------------------------------------------- a model's layout


def by_path(layout: Any) -> dict[str, Any]:
    flat: Any = tree_flatten(layout)
    return dict(flat)


LAYERS: dict[str, tuple[Callable[[mx.distributed.Group], nn.Module], set[str]]] = {
    # which parameters are sharded
    "AllToShardedLinear": (lambda g: nn.AllToShardedLinear(8, 4 * N, group=g), {"weight", "bias"}),
    "ShardedToAllLinear": (lambda g: nn.ShardedToAllLinear(4 * N, 8, group=g), {"weight"}),
    "ShardedToAllLinear without bias": (lambda g: nn.ShardedToAllLinear(4 * N, 8, bias=False, group=g), {"weight"}),
    "QuantizedAllToShardedLinear": (
        lambda g: nn.QuantizedAllToShardedLinear(64, 8 * N, group=g),
        {"weight", "scales", "biases", "bias"},
    ),
    "QuantizedShardedToAllLinear": (
        lambda g: nn.QuantizedShardedToAllLinear(64 * N, 8, group=g),
        {"weight", "scales", "biases"},
    ),
    "quantized without biases": (
        lambda g: nn.QuantizedShardedToAllLinear(64 * N, 8, group_size=32, mode="mxfp4", group=g),
        {"weight", "scales"},
    ),
    "FullyShardedModule": (
        lambda g: nn.FullyShardedModule(nn.Linear(8, 4 * N), group=g),
        {"module.weight", "module.bias"},
    ),
    "FullyShardedModule of layers": (
        lambda g: nn.FullyShardedModule(nn.Sequential(nn.Linear(8, 4 * N), nn.LayerNorm(4 * N)), group=g),
        {"module.layers.0.weight", "module.layers.0.bias", "module.layers.1.weight", "module.layers.1.bias"},
    ),
    "Linear": (lambda g: nn.Linear(3, 4), set()),
    "QuantizedLinear": (lambda g: nn.QuantizedLinear(64, 8), set()),
    "Embedding": (lambda g: nn.Embedding(5, 6), set()),
    "MultiHeadAttention": (lambda g: nn.MultiHeadAttention(8, 2), set()),
    "no parameters": (lambda g: nn.ReLU(), set()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layout_of_a_layer_spans_its_group(name: str, world: dc.World) -> None:
    make, sharded = LAYERS[name]
    layer = make(world.group)
    for model, prefix in ((layer, ""), (nn.Sequential(nn.Linear(2, 2), layer), "layers.1.")):
        for mesh, placement in ((None, S), (line(), dc.Sharded("x", mesh=line()))):
            found = by_path(dc.layout_of(model, mesh))
            assert set(found) == set(by_path(model.parameters()))
            for path, placed in found.items():
                assert placed == (placement if path in {prefix + p for p in sharded} else R), path


@several
def test_a_layer_without_a_group_spans_the_world() -> None:
    assert by_path(dc.layout_of(nn.AllToShardedLinear(8, 4 * N))) == {"weight": S, "bias": S}
    placed = dc.Sharded("x", mesh=line())
    assert by_path(dc.layout_of(nn.AllToShardedLinear(8, 4 * N), line())) == {"weight": placed, "bias": placed}
    assert by_path(dc.layout_of(nn.FullyShardedModule(nn.Linear(8, 4 * N)))) == {"module.weight": S, "module.bias": S}


def test_a_parameter_named_bias_deeper_down_is_no_exception(world: dc.World) -> None:
    model = {"bias": nn.ShardedToAllLinear(4 * N, 8, group=world.group)}
    module = nn.Module()
    module.update_modules({})
    module.bias = model["bias"]
    assert by_path(dc.layout_of(module)) == {"bias.weight": S, "bias.bias": R}


def test_layers_whose_names_begin_alike_are_told_apart(world: dc.World) -> None:
    module = nn.Module()
    module.up = nn.AllToShardedLinear(8, 4 * N, group=world.group)
    module.up_proj = nn.Linear(3, 3)
    assert by_path(dc.layout_of(module)) == {"up.weight": S, "up.bias": S, "up_proj.weight": R, "up_proj.bias": R}


@pytest.mark.mpi(min_size=4)
def test_each_layer_is_sharded_over_its_own_axis() -> None:
    mesh = square()
    tp, dp, both = (dc.Sharded(*axes, mesh=mesh) for axes in (("tp",), ("dp",), ("dp", "tp")))
    layers = nn.Sequential(
        nn.AllToShardedLinear(8, 8, group=mesh.group("tp")),
        nn.ShardedToAllLinear(8, 8, group=mesh.group("tp")),
        nn.LayerNorm(8),
    )
    assert list(by_path(dc.layout_of(layers, mesh)).values()) == [tp, tp, tp, R, R, R]
    whole = nn.AllToShardedLinear(8, 8, group=mesh.group("dp", "tp"))
    assert by_path(dc.layout_of(whole, mesh)) == {"weight": both, "bias": both}
    fully = nn.FullyShardedModule(layers, group=mesh.group("dp"))
    assert by_path(dc.layout_of(nn.Sequential(fully, nn.Linear(2, 2)), mesh)) == {
        "layers.0.module.layers.0.weight": both,
        "layers.0.module.layers.0.bias": both,
        "layers.0.module.layers.1.weight": both,
        "layers.0.module.layers.1.bias": dp,
        "layers.0.module.layers.2.weight": dp,
        "layers.0.module.layers.2.bias": dp,
        "layers.1.weight": R,
        "layers.1.bias": R,
    }


@pytest.mark.mpi(min_size=4)
def test_a_fully_sharded_module_inside_another_keeps_its_own_axis() -> None:
    mesh = square()
    inner = nn.FullyShardedModule(nn.Linear(8, 8), group=mesh.group("tp"))
    outer = nn.FullyShardedModule(nn.Sequential(inner, nn.Linear(8, 8)), group=mesh.group("dp"))
    found = by_path(dc.layout_of(outer, mesh))
    assert found == {
        "module.layers.0.module.weight": dc.Sharded("tp", mesh=mesh),
        "module.layers.0.module.bias": dc.Sharded("tp", mesh=mesh),
        "module.layers.1.weight": dc.Sharded("dp", mesh=mesh),
        "module.layers.1.bias": dc.Sharded("dp", mesh=mesh),
    }


@pytest.mark.mpi(min_size=4)
def test_a_layer_over_a_group_of_no_mesh_is_named(world: dc.World) -> None:
    model = nn.Sequential(nn.ReLU(), nn.AllToShardedLinear(8, 8, group=world.group.split(world.rank // 2)))
    for mesh in (None, square(), line()):
        with pytest.raises(
            dc.LayoutError, match=r"'layers\.1' \(AllToShardedLinear\) is sharded over a group of 2 ranks"
        ):
            dc.layout_of(model, mesh)


def slices(shape: tuple[int, ...], dim: int, group: Any) -> mx.array:
    """This rank's shard of numbers in a row."""
    whole = mx.arange(math.prod(shape), dtype=mx.float32).reshape(shape)
    return mx.split(whole, group.size(), axis=dim)[group.rank()]


def by_hand() -> Any:
    """A model whose layers layout_of does not know."""
    model: Any = nn.Module()
    model.experts, model.sinks, model.norm = nn.Module(), mx.zeros((8 * N,)), nn.RMSNorm(4)
    model.experts.weight = mx.zeros((3, 4 * N, 5))
    model.conv = nn.Conv1d(4 * N, 2, 3, bias=False)
    model.project = nn.Linear(4 * N, 4, bias=False)
    return model


@several
@pytest.mark.parametrize("meshed", [False, True], ids=["world", "mesh"])
def test_what_has_changed_its_shape_is_a_shard(meshed: bool, world: dc.World) -> None:
    model = by_hand()
    shapes = dc.shapes_of(model)
    assert shapes["experts.weight"] == (3, 4 * N, 5)
    model.experts.weight = slices((3, 4 * N, 5), 1, world.group)
    model.sinks = slices((8 * N,), 0, world.group)
    nn.layers.distributed.shard_inplace(model.conv, lambda path, weight: 2, group=world.group)
    model.project = shard_linear(model.project, "sharded-to-all", group=world.group)
    mesh = line() if meshed else None
    placed = dc.Sharded("x", mesh=line()) if meshed else S
    found = by_path(dc.layout_of(model, mesh, whole=shapes))
    cut = {"experts.weight": 1, "sinks": 0, "conv.weight": 2, "project.weight": 1}
    assert found == {path: placed if path in cut else R for path in found}
    assert {path: found[path].dim for path in cut} == cut
    with pytest.raises(dc.LayoutError, match=r"'project\.weight' is sharded by its layer.*before the model is sharded"):
        dc.layout_of(model, mesh, whole=dc.shapes_of(model))


@pytest.mark.mpi(min_size=4)
def test_the_axis_of_a_cut_is_that_of_the_tensor_parallel_layers(world: dc.World) -> None:
    mesh = square()
    dp, tp = mesh.group("dp"), mesh.group("tp")
    model: Any = nn.Module()
    model.up, model.gate, model.sinks = nn.Linear(8, 8), mx.zeros((8, 8)), mx.zeros((8,))
    shapes = dc.shapes_of(model)
    model.up = shard_linear(model.up, "all-to-sharded", group=dp)
    model.gate, model.sinks = slices((8, 8), 0, dp), slices((8,), 0, world.group)
    found = by_path(dc.layout_of(model, mesh, whole=shapes))
    over_dp, both = dc.Sharded("dp", mesh=mesh), dc.Sharded("dp", "tp", mesh=mesh)
    assert found == {"up.weight": over_dp, "up.bias": over_dp, "gate": over_dp, "sinks": both}
    model = nn.Sequential(nn.Linear(8, 8))
    shapes = dc.shapes_of(model)
    model.layers[0].weight = slices((8, 8), 0, tp)
    assert by_path(dc.layout_of(model, mesh, whole=shapes))["layers.0.weight"] == dc.Sharded("tp", mesh=mesh)
    fully = nn.Sequential(nn.FullyShardedModule(model.layers[0], group=dp))
    found = by_path(dc.layout_of(fully, mesh, whole=shapes))
    assert found == {"layers.0.module.weight": both, "layers.0.module.bias": over_dp}


@several
def test_a_shape_that_no_cut_explains_is_named(world: dc.World) -> None:
    model: Any = nn.Module()
    model.gate = mx.zeros((7 * N, 4))
    shapes = dc.shapes_of(model)
    for gate in (mx.zeros((7 * N - 1, 4)), mx.zeros((7 * N * 2, 4)), mx.zeros((7 * N * 4,))):
        model.gate = gate
        with pytest.raises(dc.LayoutError, match=r"'gate' had the shape .* no equal shard"):
            dc.layout_of(model, whole=shapes)
    model.gate = mx.zeros((N, 4))
    if N != 7:
        with pytest.raises(dc.LayoutError, match="'gate' is cut into 7 shards, which no axis"):
            dc.layout_of(model, line(), whole=shapes)


def test_parameters_that_were_added_since_are_replicas() -> None:
    model: Any = nn.Module()
    model.layer = nn.Linear(4, 4)
    shapes = dc.shapes_of(model)
    wrapped: Any = nn.Module()
    wrapped.linear, wrapped.lora_a = model.layer, mx.zeros((4, 2))
    model.layer = wrapped
    assert set(by_path(dc.layout_of(model, whole=shapes)).values()) == {R}


def test_a_models_layout_serves_its_gradients(world: dc.World) -> None:
    """Frozen parameters have no gradient, and the layout of all parameters still fits."""
    sharded = nn.AllToShardedLinear(8, 4 * N, group=world.group)
    model = nn.Sequential(nn.Linear(8, 8), sharded, nn.ShardedToAllLinear(4 * N, 2, group=world.group))
    layout = dc.layout_of(model)
    model.layers[0].freeze()
    model.layers[2].freeze(keys=["weight"])
    grads = tree_map(lambda p: normal(p.shape, 1), model.trainable_parameters())
    assert placements(grads, layout) == [S, S, R]
    only_bias = grads["layers"][2]["bias"]
    shards = [normal((4, 8), 1), normal((4,), 1)]
    assert relative(dc.global_norm(grads, layout=layout), norm64([shards] * N + [only_bias])) <= 1e-6


def test_a_model_without_parameters_has_an_empty_layout() -> None:
    assert not by_path(dc.layout_of(nn.ReLU()))
    assert dc.global_norm({}, layout=dc.layout_of(nn.ReLU())).item() == 0


def test_a_leaf_that_some_ranks_hold_counts_once(world: dc.World) -> None:
    ends = dc.Replicated(ranks=[N - 1, 0])
    assert repr(ends) == f"Replicated(ranks={tuple(sorted({0, N - 1}))})"
    assert copies(ends, world.group) == len({0, N - 1})
    grads = {"tied": normal((4,), 1)} if world.rank in (0, N - 1) else {}
    for layout in (ends, {"tied": ends}, {"tied": ends, "other": R}):
        assert relative(dc.global_norm(grads, layout=layout), norm64(normal((4,), 1))) <= 1e-6
    with pytest.raises(ValueError, match="at least one rank"):
        dc.Replicated(ranks=())


@several
def test_a_rank_that_is_not_named_must_not_hold_the_leaf(world: dc.World) -> None:
    layout = {"a": R, "tied": dc.Replicated(ranks=(N,))}
    with pytest.raises(dc.LayoutError, match=rf"Leaf 'tied' .* but rank {world.rank} holds it too: name all its ranks"):
        dc.global_norm({"a": mx.ones(1), "tied": mx.ones(2)}, layout=layout)
