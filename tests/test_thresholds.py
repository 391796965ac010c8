"""Thresholds that move: schedules, AutoClip, ZClip and AdaGC against float64, and their state saved and restored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from reference import WORLD, Array, alone, relative, same_bits
from schemes import N, bits

import distclip as dc


def recorded(steps: int = 240) -> list[float]:
    """Norms that fall, with spikes, and values that are not finite from the first step on."""
    rng = np.random.default_rng(7)
    norms = np.exp(0.25 * rng.standard_normal(steps)) * np.linspace(2.0, 0.5, steps)
    norms[rng.choice(steps, steps // 15, replace=False)] *= 25
    norms[[0, 9, 10, 40, 133]] = math.nan
    norms[[3, 12, 90, 91, 200]] = math.inf
    return norms.tolist()  # type: ignore[no-any-return]


TRACE = recorded()[: None if WORLD.size == 1 else 120]
RULES: dict[str, Any] = {
    "a number": 0.7,
    "an array": mx.array(0.7),
    "a schedule": optim.cosine_decay(2.0, 100, 0.3),
    "AutoClip": dc.AutoClip(),
    "AutoClip of a few": dc.AutoClip(percentile=62.5, history=16),
    "ZClip": dc.ZClip(max_norm=math.inf),
    "ZClip with a limit": dc.ZClip(alpha=0.9, z_score=1.5, max_norm=1.2, warm_up=7, eps=1e-3),
    "AdaGC": dc.AdaGC(warm_up=30),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def clipper_of(rule: Any) -> dc.Clipper:
    return dc.Clipper(rule, layout=dc.Replicated(), check="never", max_consecutive_skips=None)


class Fixed:
    """A rule of one's own that always says the same."""

    per_group = False

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def init(self, groups: int) -> dict[str, mx.array]:
        return {}

    def update(self, state: Any, norm: mx.array, norms: mx.array, step: mx.array) -> Any:
        return mx.array(self.limit), state


def grads_of(norm: float) -> dict[str, mx.array]:
    """Two leaves with shares of a norm that change with it."""
    share = 0.5 + 0.3 * math.sin(7 * norm) if math.isfinite(norm) else 0.6
    return {"a": mx.array([norm * share]), "b": mx.array([norm * math.sqrt(1 - share * share)])}


def thresholds(clipper: dc.Clipper, norms: list[float], compiled: bool = False) -> list[Any]:
    """What the threshold was in each step."""
    clipper.prepare(grads_of(1.0))

    def step(grads: dict[str, mx.array]) -> dict[str, mx.array]:
        return clipper(grads)[1].arrays

    run: Any = partial(mx.compile, inputs=clipper.state, outputs=clipper.state)(step) if compiled else step
    found = []
    for norm in norms:
        arrays = run(grads_of(norm))
        mx.eval(arrays, clipper.state)
        found.append(arrays["threshold"].tolist())
    return found


# ---------------------------------------------------------------------------------- the papers, in float64


def autoclip64(norms: list[float], rule: dc.AutoClip) -> Iterator[float]:
    seen: list[float] = []
    for norm in norms:
        seen += [norm] if math.isfinite(norm) else []
        yield float(np.percentile(seen[-rule.history :], rule.percentile)) if seen else math.inf


def zclip64(norms: list[float], rule: dc.ZClip) -> Iterator[float]:
    stored: list[float] = []
    mean = variance = 0.0
    for norm in norms:
        if not math.isfinite(norm):
            yield math.nan
        elif len(stored) < rule.warm_up:
            stored.append(norm)
            mean, variance = float(np.mean(stored)), float(np.var(stored))
            yield rule.max_norm
        else:
            z = (norm - mean) / (math.sqrt(variance) + rule.eps)
            allowed = mean + rule.z_score * math.sqrt(variance) / (z / rule.z_score) if z > rule.z_score else norm
            yield min(allowed if z > rule.z_score else math.inf, rule.max_norm)
            mean = rule.alpha * mean + (1 - rule.alpha) * allowed
            variance = rule.alpha * variance + (1 - rule.alpha) * (allowed - mean) ** 2


def adagc64(rows: list[Array], rule: dc.AdaGC) -> Iterator[Array]:
    running = np.full(len(rows[0]), math.inf)
    seen = 0
    for norms in rows:
        if not np.isfinite(norms).all():
            yield np.full_like(norms, math.nan)
        elif seen < rule.warm_up:
            clipped = norms * min(1.0, rule.max_norm / (math.hypot(*norms) + 1e-6))
            running, seen = np.minimum(running, clipped), seen + 1
            yield clipped
        else:
            limits = rule.ratio * running
            running = rule.beta * running + (1 - rule.beta) * np.minimum(norms, limits)
            yield limits


def truth(rule: Any) -> list[Any]:
    if isinstance(rule, dc.AutoClip):
        return list(autoclip64(TRACE, rule))
    if isinstance(rule, dc.ZClip):
        return list(zclip64(TRACE, rule))
    if isinstance(rule, dc.AdaGC):
        return list(adagc64([np.array([float(x.item()) for x in grads_of(n).values()]) for n in TRACE], rule))  # type: ignore[arg-type]
    return [float(rule(mx.array(i))) if callable(rule) else 0.7 for i in range(len(TRACE))]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=alone)], ids=["eager", "compiled"])
@every_rule
def test_a_rule_follows_its_paper_step_by_step(rule: Any, compiled: bool) -> None:
    clipper = clipper_of(rule)
    expected = truth(rule)
    if callable(rule):  # a skipped step is no step of the schedule
        gone = np.cumsum([0] + [not math.isfinite(norm) for norm in TRACE])
        expected = [float(rule(mx.array(i - int(gone[i])))) for i in range(len(TRACE))]
    found = thresholds(clipper, TRACE, compiled)
    for i, norm in enumerate(TRACE):
        if math.isfinite(norm):
            np.testing.assert_allclose(found[i], expected[i], rtol=1e-4, err_msg=f"step {i}")
    assert all(np.isfinite(np.array(leaf)).all() for leaf in clipper.state["threshold"].values())
    assert clipper.state["bad"].item() == sum(not math.isfinite(norm) for norm in TRACE)
    assert same_bits(clipper.state)


@pytest.mark.parametrize("at", [31, *(pytest.param(at, marks=alone) for at in (0, 1, 29, 30, 77))])
@every_rule
def test_a_restored_run_goes_on_to_the_same_bits(rule: Any, at: int, tmp_path: Path) -> None:
    whole = clipper_of(rule)
    expected = thresholds(whole, TRACE[:90])
    first = clipper_of(rule)
    thresholds(first, TRACE[:at])
    saved: Any = tree_flatten(first.state)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(saved))
    loaded: Any = mx.load(str(tmp_path / "state.safetensors"))
    second = clipper_of(rule)
    second.state = tree_unflatten(list(loaded.items()))
    assert str(thresholds(second, TRACE[at:90])) == str(expected[at:])
    assert bits(second.state) == bits(whole.state)


@alone
@every_rule
def test_a_state_is_of_arrays_alone(rule: Any) -> None:
    clipper = clipper_of(rule)
    clipper(grads_of(1.0))
    flat: Any = tree_flatten(clipper.state)
    assert all(isinstance(value, mx.array) for _, value in flat)


@pytest.mark.parametrize("join", [False, True])
def test_schedules_of_mlx_serve(join: bool) -> None:
    schedule = optim.cosine_decay(2.0, 6)
    if join:
        schedule = optim.join_schedules([optim.linear_schedule(0.5, 2.0, 3), schedule], [3])
    expected = [float(schedule(mx.array(i))) for i in range(8)]
    for compiled in (False, True):
        found = thresholds(clipper_of(schedule), [1.0] * 8, compiled)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@alone
def test_a_schedule_may_give_any_scalar() -> None:
    for form in (float, mx.array, lambda x: mx.array([x]), np.float32):
        report = clipper_of(lambda step, form=form: form(0.5))(grads_of(5.0))[1]
        assert (report.threshold.shape, report.scale.shape) == ((), ())
        assert report.scale.item() == pytest.approx(0.1)


@alone
def test_a_threshold_may_be_any_scalar() -> None:
    for limit in (2, 2.0, mx.array(2), mx.array([2.0]), mx.array(2.0, mx.float16), np.float32(2), np.int64(2)):
        clipped, report = clipper_of(limit)({"a": mx.array([4.0])})
        assert (report.threshold.shape, report.to_dict()["threshold"]) == ((), 2.0)
        assert clipped["a"].item() == pytest.approx(2.0)


@alone
def test_an_own_rule_serves() -> None:
    class Halving:
        per_group = False

        def init(self, groups: int) -> dict[str, mx.array]:
            return {"limit": mx.array(8.0)}

        def update(self, state: Any, norm: mx.array, norms: mx.array, step: mx.array) -> Any:
            return state["limit"], {"limit": state["limit"] / 2}

    assert thresholds(clipper_of(Halving()), [1.0] * 4) == [8, 4, 2, 1]


# -------------------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize(
    "rule", [dc.AutoClip(history=4), dc.ZClip(warm_up=3, max_norm=10.0)], ids=["AutoClip", "ZClip"]
)
def test_a_huge_norm_does_not_poison_a_rule(rule: Any) -> None:
    clipper = clipper_of(rule)
    found = thresholds(clipper, [1.0, 1e30, 1.2] + [1.0 + 0.1 * (i % 3) for i in range(40)])
    assert np.isfinite(found).all()
    assert all(np.isfinite(np.array(leaf)).all() for leaf in clipper.state["threshold"].values())


def test_the_first_threshold_of_autoclip_is_the_first_norm() -> None:
    assert thresholds(clipper_of(dc.AutoClip()), [3.0]) == [3.0]
    assert thresholds(clipper_of(dc.AutoClip(percentile=0)), [3.0, 2.0, 5.0]) == [3, 2, 2]
    assert thresholds(clipper_of(dc.AutoClip(percentile=100)), [3.0, 2.0, 5.0]) == [3, 3, 5]


@alone
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-6, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize(
    "rule", [dc.AutoClip(50), dc.ZClip(max_norm=math.inf, warm_up=2), dc.AdaGC(warm_up=2, max_norm=math.inf, ratio=1.0)]
)
def test_a_norm_at_its_learned_threshold_is_left_as_it_is(rule: Any, size: float, compiled: bool) -> None:
    clipper = clipper_of(rule)
    clipper.prepare(grads_of(size))
    step: Any = lambda grads: clipper(grads)[0]  # noqa: E731
    if compiled:
        step = partial(mx.compile, inputs=clipper.state, outputs=clipper.state)(step)
    for _ in range(6):
        clipped = step(grads_of(size))
        assert bits(clipped) == bits(grads_of(size))
    assert clipper.state["clipped"].item() == 0
    # A float32 sum of squares may be off by one rounding, and then the norm is above the same norm before.
    for norm, limit in ((2 * size, size), (1e3 * size, size)):
        clipped, report = clipper_of(Fixed(limit))(grads_of(norm))
        assert report.scale.item() == pytest.approx(limit / norm, rel=1e-6)


@alone
def test_a_learned_threshold_of_zero_makes_zeros_and_keeps_zeros() -> None:
    clipped, report = clipper_of(Fixed(0.0))(grads_of(0.0))
    assert (report.scale.item(), clipped["a"].item()) == (1.0, 0.0)
    clipped, report = clipper_of(Fixed(0.0))(grads_of(3.0))
    assert (report.scale.item(), clipped["a"].item()) == (0.0, 0.0)
    assert clipper_of(Fixed(-1.0))(grads_of(3.0))[1].scale.item() == 0.0


def test_adagc_keeps_small_gradients_below_their_limit_as_they_are() -> None:
    clipper = clipper_of(dc.AdaGC(warm_up=2))
    for _ in range(5):
        clipped, report = clipper({"big": mx.array([0.5]), "tiny": mx.array([1e-8]), "zero": mx.array([0.0])})
        assert (clipped["big"].item(), clipped["zero"].item()) == (0.5, 0.0)
        assert clipped["tiny"].item() == pytest.approx(1e-8, rel=1e-6)
        assert not report.clipped.item()


def test_adagc_limits_a_small_gradient_to_its_own_norm() -> None:
    clipper = clipper_of(dc.AdaGC(warm_up=2, ratio=1.0))
    for size in (1.0, 1.0, 10.0):
        clipped, report = clipper({"big": mx.array([0.5]), "tiny": mx.array([1e-7 * size])})
    assert clipped["tiny"].item() == pytest.approx(1e-7, rel=1e-5)
    assert (clipped["big"].item(), report.clipped.item()) == (0.5, True)


def test_adagc_lets_a_leaf_learn_whose_first_gradient_is_zero() -> None:
    """The first matrix of a LoRA pair has none in the first step."""
    clipper = clipper_of(dc.AdaGC(warm_up=2))
    for i in range(5):
        clipped, _ = clipper({"a": mx.array([0.1 if i else 0.0]), "b": mx.array([0.2])})
    assert clipped["a"].item() == pytest.approx(0.1)


@pytest.mark.parametrize("by_function", [False, True], ids=["by leaf", "by function"])
def test_adagc_over_ranks_that_hold_different_leaves(by_function: bool, world: dc.World) -> None:
    def tree(rank: int, step: int) -> dict[str, Array]:
        rng = np.random.default_rng((rank, step))
        return {f"stage{rank}": np.exp(rng.standard_normal(2)), f"head{rank}": np.exp(rng.standard_normal(1))}

    def name(path: str) -> str:
        return path[:5] if by_function else path

    rule = dc.AdaGC(warm_up=10, max_norm=2.0)
    names = sorted({name(path) for rank in range(N) for path in tree(rank, 0)})
    rows = []
    for step in range(40):
        sums = dict.fromkeys(names, 0.0)
        for rank in range(N):
            for path, values in tree(rank, step).items():
                sums[name(path)] += float(np.square(values).sum())
        rows.append(np.sqrt([sums[each] for each in names]))
    clipper = dc.Clipper(rule, groups=name if by_function else None, check="never")
    for step, limits in enumerate(adagc64(rows, rule)):
        grads = {path: mx.array(values.astype(np.float32)) for path, values in tree(world.rank, step).items()}
        clipped, report = clipper(grads)
        assert report.names == names
        np.testing.assert_allclose(report.threshold.tolist(), limits, rtol=1e-5)
        for path, leaf in clipped.items():
            at = names.index(name(path))
            scale = min(1.0, limits[at] / rows[step][at])
            np.testing.assert_allclose(np.array(leaf), tree(world.rank, step)[path] * scale, rtol=1e-5)
    assert relative(report.norm, math.hypot(*rows[-1])) <= 1e-6
    assert same_bits([report.arrays, clipper.state])


WRONG: list[tuple[Any, str]] = [
    (lambda: dc.AutoClip(percentile=101), "percentile should be between 0 and 100, 101"),
    (lambda: dc.AutoClip(percentile=math.nan), "percentile should be between 0 and 100, nan"),
    (lambda: dc.AutoClip(history=0), "history should be at least 1, 0"),
    (lambda: dc.ZClip(alpha=1.0), r"alpha should be at least 0 and below 1, 1\.0"),
    (lambda: dc.ZClip(z_score=0), "z_score should be > 0, 0"),
    (lambda: dc.ZClip(warm_up=0), "warm_up should be at least 1, 0"),
    (lambda: dc.ZClip(max_norm=-1), "max_norm should be >= 0, -1"),
    (lambda: dc.AdaGC(ratio=0), "ratio should be > 0, 0"),
    (lambda: dc.AdaGC(beta=1), "beta should be at least 0 and below 1, 1"),
    (lambda: dc.AdaGC(warm_up=0), "warm_up should be at least 1, 0"),
    (lambda: dc.AdaGC(max_norm=math.nan), "max_norm should be >= 0, nan"),
    (lambda: dc.Clipper(-1.0), r"max_norm should be >= 0, -1\.0"),
    (lambda: dc.Clipper(math.nan), "max_norm should be >= 0, nan"),
]


@alone
@pytest.mark.parametrize(("make", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_wrong_number_is_said_so(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@alone
@pytest.mark.parametrize("wrong", ["1.0", None, dc.AutoClip, [1.0]], ids=str)
def test_what_is_no_threshold_is_said_so(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"max_norm is .*; pass a number, a schedule"):
        dc.Clipper(wrong)
