"""Norms of groups of leaves, against float64, for trees that are the same on all ranks and trees that are not."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
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


def test_a_group_that_is_new_in_a_later_step_is_an_error() -> None:
    clipper = dc.Clipper(groups=lambda path: path.split(".")[0], check="never")
    clipper({"a": mx.ones(3)})
    with pytest.raises(
        ValueError, match=r"Leaf 'b\.w' is in group 'b', which no leaf was in in the first step: \['a'\]"
    ):
        clipper({"a": mx.ones(3), "b": {"w": mx.ones(2)}})


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
