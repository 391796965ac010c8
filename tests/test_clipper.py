"""The service: what a step reports, what a bad value does on every rank, loss scales, compiled steps, saved states."""

from __future__ import annotations

import copy
import json
import math
import socket
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import launching
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from reference import Array, alone, leaves, normal, powers64, relative, same_bits, several, told_by_all, wide
from schemes import BAD, EXACT, SCHEMES, N, Scheme, bits, culprits, every_scheme
from test_average import IN_FLIGHT, ORDER, counted

import distclip as dc


def by_leaf(path: str) -> str:
    return path


POLICIES = ("skip", "zero", "propagate", "raise")


def counters(clipper: dc.Clipper) -> list[int]:
    return [clipper.state[name].item() for name in ("step", "clipped", "bad", "in_a_row")]


# ------------------------------------------------------------------------------------------ what a step reports


@every_scheme
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_a_step_is_clipped_by_the_true_norm_and_reported(scheme: Scheme, max_norm: float) -> None:
    clipper = dc.Clipper(max_norm, **scheme.options())
    for step in range(3):
        clipped, report = clipper(scheme.grads(step))
        truth = scheme.norm(step)
        scale = min(1.0, max_norm / (truth + 1e-6))
        assert relative(report.norm, truth) <= 1e-6
        assert relative(report.scale, scale) <= 1e-6
        assert (
            relative(
                dc.Clipper(math.inf, **scheme.options())(clipped)[1].norm
                if scheme.partials == 1
                else report.norm * scale,
                truth * scale,
            )
            <= 1e-6
        )
        found = report.to_dict()
        assert (found["finite"], found["skipped"], found["clipped"]) == (True, False, max_norm < 1)
        assert (found["threshold"], found["step"]) == (max_norm, step + 1)
        assert json.loads(json.dumps(found)) == found
        assert same_bits(report.arrays)
    assert counters(clipper) == [3, 3 if max_norm < 1 else 0, 0, 0]
    assert same_bits(clipper.state)


@every_scheme
def test_it_equals_the_functions(scheme: Scheme) -> None:
    options = scheme.options()
    average, layout = options.get("average", False), options.get("layout", dc.Sharded())
    clipped, report = dc.Clipper(0.5, **options)(scheme.grads(0))
    if average is False:
        expected, norm = dc.clip_grad_norm(scheme.grads(0), 0.5, layout=layout)
    else:
        placed = options.get("layout", dc.Replicated())
        group = None if average is True else average
        expected, norm = dc.average_and_clip(scheme.grads(0), 0.5, group=group, layout=placed)
    assert bits([clipped, report.norm]) == bits([expected, norm])


@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf])
@pytest.mark.parametrize("average", [False, True])
def test_other_norms(norm_type: float, average: bool, world: dc.World) -> None:
    clipper = dc.Clipper(0.5, norm_type=norm_type, average=average)
    clipped, report = clipper({"w": normal((30,), world.rank)})
    all_ranks = [wide(normal((30,), rank)) for rank in range(N)]
    whole = np.mean(all_ranks, axis=0) if average else np.concatenate(all_ranks)
    truth = float(np.linalg.norm(whole, norm_type))
    assert relative(report.norm, truth) <= 1e-6
    mine = whole if average else all_ranks[world.rank]
    np.testing.assert_allclose(wide(clipped["w"]), mine * (0.5 / truth), rtol=1e-5, atol=1e-7)
    bad, report = clipper({"w": mx.array([math.nan if world.rank == 0 else 1.0])})
    assert (report.skipped.item(), powers64(bad)) == (True, 0)


@pytest.mark.parametrize("grads", [{}, [], {"a": None}], ids=str)
@pytest.mark.parametrize("average", [False, True])
def test_a_tree_without_leaves_has_norm_0(grads: Any, average: bool) -> None:
    clipped, report = dc.Clipper(1.0, average=average)(grads)
    assert clipped == grads
    assert (report.norm.item(), report.scale.item(), report.finite.item()) == (0, 1, True)


def test_integers_become_float32_and_other_types_stay() -> None:
    grads = {"i": mx.array([3, 4]), "h": mx.array([0.0], mx.bfloat16), "n": None}
    clipped, report = dc.Clipper(1.0, layout=dc.Replicated())(grads)
    assert (clipped["i"].dtype, clipped["h"].dtype, clipped["n"]) == (mx.float32, mx.bfloat16, None)
    assert report.norm.item() == 5


@alone
def test_a_report_says_what_it_has() -> None:
    report = dc.Clipper(1.0)({"w": mx.ones(3)})[1]
    with pytest.raises(AttributeError, match="This report has no 'nrom'; it has norm, threshold, scale"):
        _ = report.nrom
    with pytest.raises(AttributeError, match="no 'noise_scale'"):
        _ = report.noise_scale
    for other in (copy.copy(report), copy.deepcopy(report)):
        assert other.to_dict() == report.to_dict()


def test_one_collective_a_step_whatever_is_asked_for(world: dc.World, collectives: Counter[str]) -> None:
    grads = {f"w{i}": normal((4,), (world.rank, i)) for i in range(5)}
    everything: dict[str, Any] = {"groups": {"first": "w[01]", "last": "w4"}, "check": "never"}
    for max_norm in (1.0, dc.AutoClip(), dc.ZClip(), dc.AdaGC()):
        clipper = dc.Clipper(max_norm, **everything)
        for _ in range(2):
            _, messages = counted(collectives, lambda: (clipper(grads)[0], clipper.state))  # noqa: B023
            assert (messages, collectives.total()) == (min(N - 1, 1), min(N - 1, 1))
        replicated = dc.Clipper(max_norm, layout=dc.Replicated(), **everything)
        counted(collectives, lambda: replicated({"w0": mx.ones(3)})[0])  # noqa: B023
        assert collectives.total() == 0


@several
@pytest.mark.parametrize("groups", [None, {"first": "w[01]"}], ids=["whole", "groups"])
def test_averaging_adds_no_collective(groups: Any, world: dc.World, collectives: Counter[str]) -> None:
    clipper = dc.Clipper(1.0, average=True, groups=groups, check="never")
    grads = {f"w{i}": normal((4,), (world.rank, i)) for i in range(5)}
    mx.eval(clipper(grads)[0])
    _, messages = counted(collectives, lambda: (clipper(grads)[0], clipper.state))
    assert messages == 1 + ORDER
    clipper = dc.Clipper(1.0, average=True, groups=groups, check="never", rank_batch=4)
    mx.eval(clipper(grads)[0])
    _, messages = counted(collectives, lambda: (clipper(grads)[0], clipper.state))
    assert messages == 2 + ORDER  # and the ranks' own norms


# ---------------------------------------------------------------------------------------------- not finite


@every_scheme
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_bad_value_on_one_rank_is_one_decision(value: float, policy: str, scheme: Scheme) -> None:
    clipper = dc.Clipper(0.5, nonfinite=policy, **scheme.options())
    for bad in culprits(value):
        start = counters(clipper)
        if policy == "raise":
            with pytest.raises(FloatingPointError) as error:
                clipper(scheme.spoiled(1, value, bad))
            assert len(set(told_by_all(str(error.value)))) == (N if scheme is SCHEMES["replicated"] else 1)
            assert "'s.w' (1 " in str(error.value)
            if scheme is not SCHEMES["replicated"]:
                assert f"rank {bad}: 's.w' (1 " in str(error.value)
                assert str(error.value).count("'s.w'") == 1
            assert counters(clipper) == start
            continue
        clipped, report = clipper(scheme.spoiled(1, value, bad))
        found = report.to_dict()
        assert (found["finite"], found["skipped"], found["clipped"]) == (False, policy == "skip", False)
        assert not math.isfinite(found["norm"])
        assert same_bits([report.arrays, clipper.state])
        assert counters(clipper) == [start[0] + 1, start[1], start[2] + 1, 1]
        values = np.concatenate([wide(leaf).reshape(-1) for leaf in leaves(clipped)])
        if policy in ("skip", "zero"):
            assert np.all(values == 0)
        elif math.isnan(value):
            assert np.isnan(values).all()
        else:
            assert np.all((values == 0) | np.isnan(values))
        clipped, report = clipper(scheme.grads(2))
        assert relative(report.norm, scheme.norm(2)) <= 1e-6
        assert counters(clipper) == [start[0] + 2, start[1] + 1, start[2] + 1, 0]


@every_scheme
@pytest.mark.parametrize("policy", POLICIES)
def test_a_huge_value_is_clipped(policy: str, scheme: Scheme) -> None:
    clipper = dc.Clipper(0.5, nonfinite=policy, **scheme.options())
    grads = scheme.spoiled(0, 1e30, N - 1)
    clipped, report = clipper(grads)
    # One partial gradient of several has it; or every copy, counted once.
    assert relative(report.norm, 1e30 / scheme.partials) <= 1e-6
    assert (report.finite.item(), report.clipped.item(), report.skipped.item()) == (True, True, False)
    assert max(float(np.abs(wide(leaf)).max()) for leaf in leaves(clipped)) <= 0.5 * (1 + 1e-6)
    assert counters(clipper) == [1, 1, 0, 0]
    assert same_bits([report.arrays, clipper.state])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_huge_value_of_a_large_leaf_is_not_finite_for_float32_sums(policy: str, world: dc.World) -> None:
    grads = {"w": normal((3000,), world.rank)}
    if world.rank == N - 1:
        grads["w"][5] = 1e30
    clipper = dc.Clipper(0.5, nonfinite=policy)
    if EXACT:
        assert relative(clipper(grads)[1].norm, 1e30) <= 1e-6
    elif policy == "raise":
        with pytest.raises(FloatingPointError, match=rf"rank {N - 1}: 'w' \(the square of 1e\+30 does not fit float32"):
            clipper(grads)
    else:
        clipped, report = clipper(grads)
        assert (report.finite.item(), report.skipped.item(), powers64(clipped)) == (False, policy == "skip", 0)
        assert f"rank {N - 1} on {socket.gethostname()}: 'w' (the square of" in clipper.explain(grads)
        assert same_bits([report.arrays, clipper.state])


@every_scheme
@pytest.mark.parametrize("groups", [None, by_leaf], ids=["whole", "by leaf"])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_culprit_is_named_on_every_rank(norm_type: float, groups: Any, scheme: Scheme) -> None:
    if groups is not None and norm_type == math.inf:
        return
    for bad in {0, N - 1}:
        grads = scheme.spoiled(0, math.nan, bad)
        clipper = dc.Clipper(1.0, nonfinite="raise", norm_type=norm_type, groups=groups, **scheme.options())
        told = clipper.explain(grads)
        assert len(set(told_by_all(told))) == 1
        expected = [f"rank {rank} on {socket.gethostname()}: 's.w' (1 NaN)" for rank in range(N)]
        assert told.splitlines() == (expected if scheme is SCHEMES["replicated"] else [expected[bad]])
        assert clipper.explain(scheme.grads(0)) == "every value is finite"
        if scheme is SCHEMES["replicated"]:
            continue
        with pytest.raises(FloatingPointError) as error:
            clipper(grads)
        assert len(set(told_by_all(str(error.value)))) == 1
        lines = [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]
        assert lines == [f"rank {bad}: 's.w' (1 NaN)"]


@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize("average", [False, True])
def test_too_many_bad_steps_in_a_row_raise_on_every_rank(bound: int, average: bool, world: dc.World) -> None:
    clipper = dc.Clipper(1.0, max_consecutive_skips=bound, average=average)
    good, bad = {"w": mx.ones(2)}, {"w": mx.array([1.0, math.nan if world.rank == N - 1 else 1.0])}
    good = {"w": normal((2,), world.rank)}
    for grads in [bad] * bound + [good] + [bad] * (bound + 1):
        clipper(grads)
    for call in (clipper.settle, lambda: clipper(good)):
        with pytest.raises(
            FloatingPointError, match=f"{bound + 1} steps in a row, up to step {2 * bound + 2}"
        ) as error:
            call()
        assert f"max_consecutive_skips is {bound}." in str(error.value)
        assert len(set(told_by_all(str(error.value)))) == 1


@pytest.mark.parametrize("policy", ["skip", "zero", "propagate"])
def test_nothing_is_raised_where_nothing_was_asked_for(policy: str) -> None:
    clipper = dc.Clipper(1.0, max_consecutive_skips=None if policy == "skip" else 0, nonfinite=policy)
    for _ in range(15):
        _, report = clipper({"w": mx.array([math.nan])})
    clipper.settle()
    assert counters(clipper) == [15, 0, 15, 15]
    assert report.skipped.item() == (policy == "skip")


# ---------------------------------------------------------------------------------------------- loss scale


@every_scheme
@pytest.mark.parametrize("groups", [None, {"s": "s.*"}, by_leaf], ids=["whole", "groups", "by leaf"])
@pytest.mark.parametrize(
    "max_norm", [0.5, pytest.param(1e6, marks=alone), dc.AdaGC(warm_up=1)], ids=["clips", "keeps", "AdaGC"]
)
def test_a_loss_scale_changes_nothing_but_the_gradients_range(max_norm: Any, groups: Any, scheme: Scheme) -> None:
    scaled_by = 1024.0
    options = {"groups": groups, **scheme.options()}
    plain, always = dc.Clipper(max_norm, **options), dc.Clipper(max_norm, loss_scale=scaled_by, **options)
    as_array = dc.Clipper(max_norm, loss_scale=mx.array(scaled_by), **options)
    per_call = dc.Clipper(max_norm, loss_scale=3.0, **options)
    for step in range(2):
        expected, report = plain(scheme.grads(step))
        for clipper, given in (
            (always, None),
            (as_array, None),
            (per_call, scaled_by),
            (per_call, mx.array(scaled_by)),
        ):
            if clipper is per_call and isinstance(max_norm, dc.AdaGC):
                continue
            clipped, same = clipper(scheme.grads(step, at=scaled_by), loss_scale=given)
            for name in ("norm", "threshold", "scale"):
                np.testing.assert_allclose(np.array(same.arrays[name]), np.array(report.arrays[name]), rtol=1e-6)
            for a, b in zip(leaves(clipped), leaves(expected), strict=True):
                np.testing.assert_allclose(wide(a), wide(b), rtol=2e-6)


def test_float16_gradients_of_a_scaled_loss() -> None:
    true = np.array([3e-5, -4e-5, 1e-6])
    grads = {"w": mx.array(true * 2**15).astype(mx.float16)}
    for policy in ("skip", "zero"):
        clipper = dc.Clipper(1e-5, loss_scale=2.0**15, nonfinite=policy, layout=dc.Replicated())
        clipped, report = clipper(grads)
        assert relative(report.norm, float(np.linalg.norm(true))) <= 1e-3
        assert clipped["w"].dtype == mx.float32
        wanted = true * float(report.scale)
        np.testing.assert_allclose(wide(clipped["w"]), wanted, rtol=1e-3)
        clipped, report = clipper({"w": mx.array([6e4, 6e4]).astype(mx.float16) * 4})
        assert (report.finite.item(), powers64(clipped)) == (False, 0)


# ------------------------------------------------------------------------------------------- inside compile


@pytest.mark.parametrize("scheme", [SCHEMES["sharded"], SCHEMES["averaged"]], ids=["sharded", "averaged"])
def test_a_compiled_step_equals_the_eager_one(scheme: Scheme) -> None:
    def run(compiled: bool) -> tuple[list[Any], list[Array], Any]:
        clipper = dc.Clipper(
            dc.AutoClip(percentile=50, history=8), groups={"s": "s.*"}, check="never", **scheme.options()
        )

        def step(grads: Any) -> Any:
            clipped, report = clipper(grads)
            return clipped, report.arrays

        call: Any = partial(mx.compile, inputs=clipper.state, outputs=clipper.state)(step) if compiled else step
        reports, found = [], []
        for i in range(5):
            grads = scheme.spoiled(i, math.nan, 0) if i == 2 else scheme.grads(i)
            clipped, arrays = call(grads)
            mx.eval(clipped, clipper.state)
            report = clipper.report(arrays).to_dict()
            reports.append(
                {k: v for k, v in report.items() if i != 2 or k not in ("norm", "scale", "groups", "threshold")}
            )
            found += [wide(leaf) for leaf in leaves(clipped)]
        clipper.settle()
        return reports, found, clipper.state

    eager, compiled = run(False), run(True)
    for one, other in zip(eager[0], compiled[0], strict=True):
        assert (
            one == pytest.approx(other, rel=1e-5)
            if "groups" not in one
            else one["groups"] == pytest.approx(other["groups"], rel=1e-5)
        )
        assert [one[k] for k in ("step", "finite", "skipped")] == [other[k] for k in ("step", "finite", "skipped")]
    for a, b in zip(eager[1], compiled[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert same_bits(compiled[2])
    for one, other in zip(leaves(eager[2]), leaves(compiled[2]), strict=True):
        np.testing.assert_allclose(wide(one), wide(other), rtol=1e-5)


def test_a_compiled_loop_that_settles_raises(world: dc.World) -> None:
    clipper = dc.Clipper(1.0, max_consecutive_skips=1, check="never")
    step = partial(mx.compile, inputs=clipper.state, outputs=clipper.state)(lambda grads: clipper(grads)[0])
    bad = {"w": mx.array([1.0, math.nan if world.rank == 0 else 1.0])}
    for _ in range(2):
        clipper.settle()
        mx.eval(step(bad))
    with pytest.raises(FloatingPointError, match="2 steps in a row, up to step 2"):
        clipper.settle()


# --------------------------------------------------------------------------------------------- check="first"


@several
def test_a_wrong_layout_is_found_in_the_first_call(world: dc.World) -> None:
    grads = {"w": normal((70,), 0)}
    with pytest.raises(dc.LayoutError, match="All gradients are equal on all ranks"):
        dc.Clipper(1.0)(grads)
    dc.Clipper(1.0, check="never")(grads)
    layout = {"v": dc.Replicated(), "u": dc.Sharded()}
    missing = {"u": normal((5,), world.rank), **({"v": normal((5,), 0)} if world.rank == 0 else {})}
    with pytest.raises(dc.LayoutError, match=r"v: called Replicated.*it is missing on"):
        dc.Clipper(1.0, layout=layout)(missing)


@every_scheme
def test_the_check_costs_the_first_call_alone(scheme: Scheme, collectives: Counter[str]) -> None:
    clipper = dc.Clipper(1.0, **scheme.options())
    dc.average_gradients(scheme.grads(0))  # which compares this tree once for all
    mx.eval(clipper(scheme.grads(0))[0])
    collectives.clear()
    mx.eval(clipper(scheme.grads(1))[0], clipper.state)
    assert collectives["all_gather"] == (IN_FLIGHT and scheme.partials > 1)


@every_scheme
def test_the_check_bears_a_bad_first_step(scheme: Scheme) -> None:
    for policy in ("skip", "zero", "propagate"):
        clipper = dc.Clipper(1.0, nonfinite=policy, **scheme.options())
        assert not clipper(scheme.spoiled(0, math.nan, 0))[1].finite.item()


@several
def test_a_first_call_inside_compile_warns() -> None:
    clipper = dc.Clipper(1.0)
    step = partial(mx.compile, inputs=clipper.state, outputs=clipper.state)(lambda grads: clipper(grads)[0])
    with pytest.warns(RuntimeWarning, match="The layout was not checked") as seen:
        mx.eval(step({"w": mx.ones(3)}))
    assert len(seen) == 1
    mx.eval(step({"w": mx.ones(3)}))


# ------------------------------------------------------------------------------------------------- the state


def test_a_state_given_back_goes_on(world: dc.World, tmp_path: Path) -> None:
    def make() -> dc.Clipper:
        return dc.Clipper(dc.ZClip(warm_up=3), average=True, rank_batch=4, groups=lambda path: path[0])

    def run(clipper: dc.Clipper, steps: range) -> list[str]:
        return [
            str(clipper({"a": normal((3,), (world.rank, i)), "b": normal((2,), (world.rank, i, 1))})[1].to_dict())
            for i in steps
        ]

    whole = make()
    expected = run(whole, range(8))
    first = make()
    run(first, range(4))
    flat: Any = tree_flatten(first.state)
    assert all(isinstance(value, mx.array) for _, value in flat)
    mx.save_safetensors(str(tmp_path / "clipper.safetensors"), dict(flat))
    loaded: Any = mx.load(str(tmp_path / "clipper.safetensors"))
    second = make()
    second.state = tree_unflatten(list(loaded.items()))
    assert run(second, range(4, 8)) == expected[4:]
    assert bits(second.state) == bits(whole.state)


LONG = """
import gc
import mlx.core as mx, mlx.optimizers as optim
import distclip as dc

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def run(step, steps=900):
    parameters = {"w": mx.ones(4)}
    for i in range(steps):
        parameters = step(parameters)
        mx.eval(parameters)
        if i == steps // 3:
            gc.collect()
            start = mx.get_active_memory(), resident()
    gc.collect()
    print(mx.get_active_memory() - start[0], resident() - start[1])

grads = {"w": mx.full((4,), 0.5)}
for skips in (None, 10):
    for rule in (1.0, dc.ZClip()):
        clipper = dc.Clipper(rule, max_consecutive_skips=skips)
        run(lambda parameters: clipper(grads)[0])
    optimizer = dc.ClippedOptimizer(optim.SGD(1e-3, momentum=0.9), dc.Clipper(max_consecutive_skips=skips))
    run(lambda parameters: optimizer.apply_gradients(grads, parameters))
"""


@pytest.mark.launches
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own numbers")
def test_memory_does_not_grow_where_only_parameters_are_evaluated(tmp_path: Path) -> None:
    ended = launching.alone(LONG, tmp_path)
    assert ended.code == 0, ended.output
    grown = [line.split() for line in ended.output.splitlines()]
    assert len(grown) == 6, ended.output
    for active, resident in grown:  # over 600 steps
        assert int(active) < 600, ended.output
        assert int(resident) < 2**20, ended.output


# ------------------------------------------------------------------------------------------ wrong arguments

WRONG: list[tuple[Any, type[Exception], str]] = [
    (
        {"nonfinite": "ignore"},
        ValueError,
        "nonfinite should be one of 'skip', 'zero', 'propagate', 'raise', not 'ignore'",
    ),
    ({"check": "always"}, ValueError, "check should be 'first' or 'never', not 'always'"),
    ({"max_consecutive_skips": -1}, ValueError, "max_consecutive_skips should be at least 0, -1"),
    ({"groups": ["a"]}, TypeError, r"groups is \['a'\]; pass names with patterns"),
    ({"groups": {"a": 1}}, TypeError, "groups is .*; pass names with patterns"),
    ({"groups": dict}, TypeError, "groups is .*; pass names with patterns"),
    ({"groups": {"a": "*"}, "norm_type": 3}, ValueError, "need norm_type 1 or 2, 3 was"),
    ({"max_norm": dc.AdaGC(), "norm_type": math.inf}, ValueError, "need norm_type 1 or 2, inf was"),
    ({"norm_type": 0}, ValueError, "norm_type should be > 0 or math.inf, 0 was"),
    ({"norm_type": -1}, ValueError, "norm_type should be > 0 or math.inf, -1 was"),
    ({"rank_batch": 4}, ValueError, "rank_batch is the rows"),
    ({"rank_batch": 0, "average": True}, ValueError, "rank_batch is the rows"),
    ({"rank_batch": 4, "average": True, "norm_type": 1}, ValueError, "rank_batch is the rows"),
    ({"loss_scale": 0.0}, ValueError, r"loss_scale should be > 0, 0\.0 was"),
    ({"loss_scale": -1.0}, ValueError, r"loss_scale should be > 0, -1\.0 was"),
    ({"loss_scale": math.nan}, ValueError, "loss_scale should be > 0, nan was"),
    ({"loss_scale": np.float32(-1.0)}, ValueError, r"loss_scale should be > 0, -1\.0 was"),
    ({"layout": dc.Sharded}, TypeError, "The layout is the class Sharded"),
    ({"layout": {"v": dc.Sharded()}}, dc.LayoutError, "The layout has no placement for 'w'"),
    ({"layout": {"w": "tp"}}, TypeError, "The layout of leaf 'w' is 'tp'"),
]


@alone
@pytest.mark.parametrize(("options", "kind", "said"), WRONG, ids=[str(options) for options, _, _ in WRONG])
def test_a_wrong_argument_is_said_so(options: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        dc.Clipper(**options)({"w": mx.ones(3)})


@alone
def test_a_wrong_loss_scale_of_a_call_is_said_so() -> None:
    with pytest.raises(ValueError, match="loss_scale should be > 0, 0 was"):
        dc.Clipper()({"w": mx.ones(3)}, loss_scale=0)


def test_a_leaf_that_is_no_array_is_named() -> None:
    with pytest.raises(TypeError, match=r"'a\.1'"):
        dc.Clipper()({"a": [mx.ones(3), 1.0]})


@several
def test_averaged_shards_are_an_error() -> None:
    with pytest.raises(dc.LayoutError, match="'w' is called Sharded"):
        dc.Clipper(average=True, layout=dc.Sharded())({"w": mx.ones(3)})


def test_it_serves_a_training_loop(world: dc.World) -> None:
    mx.random.seed(1)
    model = nn.Linear(4, 1)
    optimizer = optim.SGD(0.1)
    clipper = dc.Clipper(1.0, average=True)
    losses = []
    for i in range(20):
        x = normal((8, 4), (world.rank, i))
        loss, grads = nn.value_and_grad(model, lambda x: (model(x) - x.sum(1, keepdims=True)).square().mean())(x)
        grads, report = clipper(grads)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), loss)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert report.step.item() == 20
    assert same_bits(model.parameters())
