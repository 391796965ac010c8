"""Norms of groups of leaves, against float64, for trees that are the same on all ranks and trees that are not."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from reference import alone, leaves, normal, powers64, relative, same_bits, several, square
from schemes import SCHEMES, N

import distclip as dc


def model(rank: int) -> dict[str, Any]:
    def block(i: int) -> dict[str, Any]:
        seed = (rank, i)
        return {
            "self_attn": {"q": normal((3, 4), (*seed, 1)), "o": normal((4,), (*seed, 2), mx.bfloat16)},
            "mlp": normal((5,), (*seed, 3)),
        }

    return {"layers": [block(i) for i in range(2)], "embedding": normal((6, 2), (rank, 9)), "none": None}


def norms64(trees: list[Any], name_of: Any, names: list[str]) -> list[float]:
    """The norm of each group over some ranks' trees, every leaf counted once."""
    total = dict.fromkeys(names, 0.0)
    for tree in trees:
        flat: Any = tree_flatten(tree)
        for path, leaf in flat:
            if leaf is not None:
                total[name_of(path)] += powers64(leaf)
    return [math.sqrt(total[name]) for name in names]


def assert_groups(report: dc.Report, names: list[str], truth: list[float]) -> None:
    assert report.names == names
    found: Any = report.group_norms.tolist()
    for value, expected in zip(found, truth, strict=True):
        assert relative(value, expected) <= 1e-6
    assert report.to_dict()["groups"] == dict(zip(names, found, strict=True))
    assert relative(report.norm, math.hypot(*truth)) <= 1e-6
    assert same_bits(report.arrays)


def test_patterns_name_groups_and_the_first_that_matches_counts(world: dc.World) -> None:
    patterns = {"attention": "*.self_attn.*", "first": "layers.0.*", "unused": "head"}

    def name_of(path: str) -> str:
        return "attention" if "self_attn" in path else "first" if path.startswith("layers.0.") else "other"

    clipper = dc.Clipper(0.5, groups=patterns)
    clipped, report = clipper(model(world.rank))
    names = ["attention", "first", "unused", "other"]
    assert_groups(report, names, norms64([model(rank) for rank in range(N)], name_of, names))
    expected, _ = dc.clip_grad_norm(model(world.rank), 0.5)
    for a, b in zip(leaves(clipped), leaves(expected), strict=True):
        assert mx.array_equal(a, b)


@alone
def test_a_pattern_may_be_called_other() -> None:
    report = dc.Clipper(groups={"other": "a*"})({"a": mx.array([3.0]), "b": mx.array([4.0])})[1]
    assert report.to_dict()["groups"] == {"other": 5.0}
    assert report.group_norms.shape == (1,)


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_functions_name_groups(norm_type: float, world: dc.World) -> None:
    def layer(path: str) -> str:
        return ".".join(path.split(".")[:2])

    clipped, report = dc.Clipper(1e6, groups=layer, norm_type=norm_type)(model(world.rank))
    assert report.names == ["embedding", "layers.0", "layers.1"]
    truth = [0.0] * 3
    for rank in range(N):
        tree = model(rank)
        parts = [tree["embedding"], *tree["layers"]]
        truth = [t + powers64(part, norm_type) for t, part in zip(truth, parts, strict=True)]
    for found, expected in zip(report.group_norms, truth, strict=True):
        assert relative(found, expected ** (1 / norm_type)) <= 1e-6
    assert clipped["none"] is None


def test_replicas_count_once_in_each_group(world: dc.World) -> None:
    grads = {"s": normal((4,), world.rank), "r": normal((5,), 77)}
    clipper = dc.Clipper(layout={"s": dc.Sharded(), "r": dc.Replicated()}, groups={"s": "s", "r": "r"})
    truth = [math.sqrt(sum(powers64(normal((4,), rank)) for rank in range(N))), math.sqrt(powers64(grads["r"])), 0.0]
    assert_groups(clipper(grads)[1], ["s", "r", "other"], truth)
    alike = dc.Clipper(layout=dc.Replicated(), groups={"r": "r"})({"r": grads["r"]})[1]
    assert_groups(alike, ["r", "other"], [truth[1], 0.0])


@pytest.mark.mpi(min_size=4)
def test_groups_on_a_mesh() -> None:
    scheme = SCHEMES["on a mesh"]
    report = dc.Clipper(groups={"s": "s.*"}, **scheme.options())(scheme.grads(0))[1]
    assert report.names == ["s", "other"]
    assert relative(math.hypot(*report.group_norms.tolist()), scheme.norm(0)) <= 1e-6  # type: ignore[misc]
    r = sum(normal((6,), (1, dp, 0, 3)) for dp in range(2)) / 2
    assert relative(report.group_norms[1], math.sqrt(powers64(r))) <= 1e-6
    tp = dc.Clipper(group=square().group("tp"), groups={"s": "s.*"}, check="never")(scheme.grads(0))[1]
    mine = [
        sum(
            powers64(normal((4, 3), (1, square().coordinates()["dp"], i, 1)))
            + powers64(normal((3,), (1, square().coordinates()["dp"], i, 2)))
            for i in range(2)
        )
    ]
    assert relative(tp.group_norms[0], math.sqrt(mine[0])) <= 1e-6


@pytest.mark.parametrize("by_function", [False, True], ids=["patterns", "function"])
def test_ranks_may_hold_different_trees(by_function: bool, world: dc.World) -> None:
    """Pipeline stages; the last of several ranks holds nothing."""

    def stage(rank: int) -> dict[str, Any]:
        if rank == N - 1 and N > 1:
            return {}
        return {f"stage{rank}": {"w": normal((3, 3), rank), "b": normal((2,), rank)}, "norm": normal((2,), rank + 50)}

    stages = [stage(rank) for rank in range(N)]
    held = max(N - 1, 1)
    groups: Any = (
        (lambda path: path.split(".")[0]) if by_function else {f"stage{r}": f"stage{r}.*" for r in range(held)}
    )
    names = sorted([*(f"stage{r}" for r in range(held)), "norm" if by_function else "other"])
    clipper = dc.Clipper(0.1, groups=groups)
    for _ in range(2):
        clipped, report = clipper(stages[world.rank])
        found = sorted(report.names)
        assert found == names

        def name_of(path: str) -> str:
            return path.split(".")[0] if by_function or path != "norm" else "other"

        assert_groups(report, report.names, norms64(stages, name_of, report.names))
        assert clipped.keys() == stages[world.rank].keys()
        mx.eval(clipped, clipper.state)
    assert relative(dc.global_norm(clipped), 0.1) <= 1e-4


@pytest.mark.parametrize("groups", [{"a": "*"}, lambda path: path], ids=["patterns", "function"])
def test_trees_that_are_empty_everywhere(groups: Any) -> None:
    clipper = dc.Clipper(groups=groups, average=False)
    clipped, report = clipper({})
    assert (clipped, report.norm.item(), set(report.group_norms.tolist())) == ({}, 0.0, {0.0})  # type: ignore[arg-type]


def test_averaged_gradients_have_groups(world: dc.World) -> None:
    for policy in ("skip", "raise"):
        clipper = dc.Clipper(0.5, average=True, groups={"a": "a*"}, nonfinite=policy)
        grads = {"a1": normal((4,), world.rank), "a2": normal((3,), world.rank), "b": normal((2,), world.rank)}
        clipped, report = clipper(grads)
        mean = [sum(normal(shape, r) for r in range(N)) / N for shape in ((4,), (3,), (2,))]
        truth = [math.sqrt(powers64(mean[:2])), math.sqrt(powers64(mean[2]))]
        assert_groups(report, ["a", "other"], truth)
        assert relative(dc.global_norm(clipped, layout=dc.Replicated()), min(0.5, math.hypot(*truth))) <= 1e-5
        assert same_bits(clipped)


def test_a_bad_value_is_in_its_group_alone(world: dc.World) -> None:
    grads = {"a": mx.array([math.nan if world.rank == N - 1 else 1.0]), "b": normal((3,), world.rank)}
    clipped, report = dc.Clipper(groups=lambda path: path)(grads)
    norms: Any = report.group_norms.tolist()
    assert math.isnan(norms[0])
    assert math.isfinite(norms[1])
    assert (report.skipped.item(), powers64(clipped)) == (True, 0)
    assert same_bits(report.arrays)


# ------------------------------------------------------------------------------------- leaves that join later


def freed(rank: int, step: int, every: bool) -> dict[str, Any]:
    """The gradients of a pipeline's stage: the last rank's second leaf joins in step 2, and leaves again in step 6."""
    joins = every or rank == N - 1
    tree = {f"stage{rank}": {"b": normal((3,), (rank, step))}}
    if joins and 2 <= step < 6:
        tree[f"stage{rank}"]["a"] = normal((2,), (rank, step, 1))
    return tree


@pytest.mark.parametrize("every", [True, False], ids=["on all ranks", "on one rank"])
@pytest.mark.parametrize("mode", ["looks", "never looks", "compiled"])
@pytest.mark.parametrize("rule", [None, dc.AdaGC(warm_up=2, max_norm=0.5)], ids=["number", "AdaGC"])
def test_leaves_join_and_leave(rule: Any, mode: str, every: bool, world: dc.World) -> None:
    clipper = dc.Clipper(
        rule or 0.5,
        groups=lambda path: path,
        check="never",
        max_consecutive_skips=None if mode == "never looks" else 10,
    )
    clipper.prepare(freed(world.rank, 0, every))

    def step(grads: Any) -> Any:
        clipped, report = clipper(grads)
        return clipped, report.arrays

    run: Any = partial(mx.compile, inputs=clipper.state, outputs=clipper.state)(step) if mode == "compiled" else step
    before = sorted(f"stage{rank}.b" for rank in range(N))
    after = sorted(before + [f"stage{rank}.a" for rank in range(N) if every or rank == N - 1])
    for number in range(8):
        grads = freed(world.rank, number, every)
        clipped, arrays = run(grads)
        mx.eval(clipped, arrays, clipper.state)
        report = clipper.report(arrays)
        whole = math.sqrt(sum(powers64(freed(rank, number, every)) for rank in range(N)))
        assert relative(report.norm, whole) <= 1e-6
        # With several ranks the others learn of new names one step later, and never where nothing is looked at.
        knows = number >= (2 if N == 1 else 3) and (N == 1 or mode == "looks")
        assert report.names == (after if knows else before)
        assert clipper.state["group_norms"].size == len(report.names)
        scale = min(1.0, 0.5 / (whole + 1e-6))
        flat: Any = tree_flatten([clipped, grads])
        by_path = {path: leaf for path, leaf in flat}
        for path in (path for path in by_path if path.startswith("0.")):
            # All by the whole norm: in the warm-up of each leaf's own, which a leaf without a name does not leave.
            if rule is None or number < 2 or (path.endswith("a") and number < 4):
                assert relative(by_path[path][0], float(by_path[f"1{path[1:]}"][0]) * scale) <= 1e-4
        assert same_bits([arrays, clipper.state])
    if rule is not None:
        state: Any = clipper.state["threshold"]
        assert state["count"].tolist() == [2] * len(clipper.names)
        assert all(map(math.isfinite, state["running"].tolist()))


@pytest.mark.parametrize("layout", ["averaged", "replicated", "sharded"])
@pytest.mark.parametrize("rule", [0.5, dc.AdaGC(warm_up=2, max_norm=0.5)], ids=["number", "AdaGC"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_is_unfrozen_step_by_step(compiled: bool, rule: Any, layout: str, world: dc.World) -> None:
    """Every rank unfreezes at once and makes the optimizer's state again, as MLX wants it."""
    mx.random.seed(3)
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in network.layers[:2]:
        layer.freeze()
    options: Any = {"average": layout == "averaged", "layout": dc.Replicated()}
    if layout == "sharded":
        options = {"layout": dc.Sharded()}
    clipper = dc.Clipper(rule, groups=lambda path: path, check="never", **options)
    optimizer = dc.ClippedOptimizer(optim.Adam(0.1), clipper)
    optimizer.init(network.trainable_parameters())
    state = [network.state, optimizer.state]

    def step(x: mx.array) -> Any:
        _, grads = nn.value_and_grad(network, lambda x: network(x).square().sum())(x)
        optimizer.update(network, grads)
        return optimizer.report.arrays

    run: Any = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
    for number in range(9):
        if number in (3, 6):
            network.layers[2 - number // 3].unfreeze()
            optimizer.init(network.trainable_parameters())
            state[:] = [network.state, optimizer.state]
            run = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
        arrays = run(mx.ones((1, 2)) * (1 + world.rank * (layout != "replicated")))
        mx.eval(state, arrays)
        clipper.settle()
        found = clipper.report(arrays)
        assert len(found.names) == 2 * (1 + number // 3)
        assert found.names == sorted(found.names)
        assert relative(found.norm, math.hypot(*found.group_norms.tolist())) <= 1e-6  # type: ignore[misc]
        assert same_bits(clipper.state)
    if rule != 0.5:
        assert clipper.state["threshold"]["count"].tolist() == [2] * 6


def listed(state: Any) -> list[Any]:
    flat: Any = tree_flatten(state)
    return sorted((path, leaf.tolist()) for path, leaf in flat)


def test_the_state_of_a_run_with_new_leaves_is_that_of_a_run_that_begins_with_them(tmp_path: Path) -> None:
    def grads(step: int) -> dict[str, mx.array]:
        tree = {"b": normal((3,), step)}
        return tree if step < 2 else {"a": normal((2,), (step, 1)), **tree}

    def run(clipper: dc.Clipper, steps: range) -> None:
        for step in steps:
            mx.eval(clipper(grads(step))[0], clipper.state)

    def make() -> dc.Clipper:
        return dc.Clipper(dc.AdaGC(warm_up=3), layout=dc.Replicated(), check="never")

    whole, first, second = make(), make(), make()
    run(whole, range(8))
    run(first, range(5))
    flat: Any = tree_flatten(first.state)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(flat))
    loaded: Any = mx.load(str(tmp_path / "state.safetensors"))
    second.state = tree_unflatten(list(loaded.items()))
    run(second, range(5, 8))
    assert listed(second.state) == listed(whole.state)
    third = make()
    run(third, range(1))
    with pytest.raises(ValueError, match=r"over 2 groups.*over 1 groups.*Call clipper\.prepare with"):
        third.state = first.state
    third.prepare(grads(5))  # the remedy
    third.state = first.state
    run(third, range(5, 8))
    assert listed(third.state) == listed(whole.state)


@several
def test_names_are_learned_before_a_compiled_step(world: dc.World) -> None:
    clipper = dc.Clipper(dc.AdaGC(warm_up=2), check="never")
    grads = {f"stage{world.rank}": normal((3,), world.rank)}
    clipper.prepare(grads)
    assert clipper.names == [f"stage{rank}" for rank in range(N)]

    @partial(mx.compile, inputs=clipper.state, outputs=clipper.state)
    def step(grads: Any) -> Any:
        return clipper(grads)[0]

    for _ in range(4):
        mx.eval(step(grads), clipper.state)
    assert clipper.state["threshold"]["running"].shape == (N,)
    assert same_bits(clipper.state)
