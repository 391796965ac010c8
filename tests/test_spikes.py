"""Finite spikes that are skipped to the bit: where they begin, against float64; on all ranks; and how they end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from reference import WORLD, alone, same_bits, told_by_all
from schemes import N, bits

import distclip as dc


def norms_of_a_run(steps: int = 240) -> list[float]:
    """Norms that fall, with spikes of all sizes, and some that are not finite."""
    rng = np.random.default_rng(5)
    norms = np.exp(0.2 * rng.standard_normal(steps)) * np.linspace(2.0, 0.5, steps)
    norms[[20, 70, 71, 120, 170, 200]] *= [3, 8, 40, 1e6, 4, 1e30]
    norms[[5, 90]] = [math.nan, math.inf]
    return norms.tolist()  # type: ignore[no-any-return]


TRACE = norms_of_a_run()[: None if WORLD.size == 1 else 130]
RULES: dict[str, Any] = {
    "z-score": dc.Spike(history=16),
    "lower z-score": dc.Spike(z_score=3.0, history=32),
    "ratio": dc.Spike(ratio=3.0, history=16),
    "odd": dc.Spike(ratio=2.5, history=15),
}


def limits64(norms: list[float], rule: dc.Spike) -> Iterator[float]:
    """The norm above which each step is skipped, in float64."""
    kept: list[float] = []
    for norm in norms:
        window, limit = kept[-rule.history :], math.inf
        if 2 * len(window) >= rule.history:
            if rule.ratio is not None:
                limit = rule.ratio * float(np.median(window))
            else:
                assert rule.z_score is not None
                limit = float(np.mean(window) + rule.z_score * max(np.std(window), 0.01 * np.mean(window)))
        yield limit
        kept += [min(norm, limit)] if math.isfinite(norm) else []


def clipper_of(skip_above: Any, max_norm: Any = math.inf, **options: Any) -> dc.Clipper:
    return dc.Clipper(max_norm, skip_above=skip_above, layout=dc.Replicated(), check="never", **options)


def run(clipper: dc.Clipper, norms: list[float], compiled: bool = False) -> list[dict[str, Any]]:
    def step(grads: Any) -> Any:
        clipped, report = clipper(grads)
        return clipped, report.arrays

    clipper.prepare({"a": mx.ones(1), "b": mx.ones(1)})
    call: Any = partial(mx.compile, inputs=clipper.state, outputs=clipper.state)(step) if compiled else step
    found = []
    for norm in norms:
        clipped, arrays = call({"a": mx.array([0.6 * norm]), "b": mx.array([0.8 * norm])})
        mx.eval(clipped, arrays, clipper.state)
        found.append({**clipper.report(arrays).to_dict(), "a": clipped["a"].item()})
    return found


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=alone)], ids=["eager", "compiled"])
@pytest.mark.parametrize("max_norm", [math.inf, dc.AdaGC(warm_up=5)], ids=["unclipped", "AdaGC"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_spikes_begin_where_the_rule_says(rule: dc.Spike, max_norm: Any, compiled: bool) -> None:
    clipper = clipper_of(rule, max_norm, max_consecutive_skips=None)
    skipped = 0
    for i, (step, norm, limit) in enumerate(
        zip(run(clipper, TRACE, compiled), TRACE, limits64(TRACE, rule), strict=True)
    ):
        np.testing.assert_allclose(step["skip_above"], limit, rtol=1e-4, err_msg=f"step {i}")
        assert step["spike"] == (math.isfinite(norm) and norm > limit)
        assert step["skipped"] == (step["spike"] or not step["finite"])
        assert step["finite"] == math.isfinite(norm)
        assert not (step["skipped"] and step["clipped"])
        assert (step["a"] == 0) == step["skipped"]
        skipped += step["spike"]
    assert 3 <= skipped < 20
    bad = sum(not math.isfinite(norm) for norm in TRACE)
    assert [clipper.state[name].item() for name in ("step", "bad", "spikes")] == [len(TRACE), bad + skipped, skipped]
    assert same_bits(clipper.state)


def test_a_number_is_a_limit_from_the_first_step_on() -> None:
    for limit in (2.0, np.float64(2), mx.array(2.0), lambda step: 2.0):
        found = run(clipper_of(limit, 1.0), [1.0, 3.0, math.nan, 2.0])
        assert [step["skipped"] for step in found] == [False, True, True, False]
        assert [step["spike"] for step in found] == [False, True, False, False]
        assert [step["skip_above"] for step in found] == [2.0] * 4


class Plain(optim.Optimizer):
    """An optimizer of one's own."""

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        state["m"] = mx.zeros_like(parameter)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        state["m"] = 0.9 * state["m"] + gradient
        return mx.subtract(parameter, 0.1 * state["m"])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("average", [False, True], ids=["sharded", "averaged"])
@pytest.mark.parametrize("inner", [lambda: optim.AdamW(optim.cosine_decay(0.1, 40)), Plain], ids=["AdamW", "own"])
def test_a_run_with_spikes_has_the_bits_of_one_without(
    inner: Any, average: bool, compiled: bool, world: dc.World
) -> None:
    def trained(norms: list[float]) -> tuple[Any, dc.ClippedOptimizer, list[bool]]:
        mx.random.seed(7)
        model = nn.Linear(3, 2)
        clipper = dc.Clipper(0.5, average=average, skip_above=dc.Spike(ratio=4.0, history=6), check="never")
        optimizer = dc.ClippedOptimizer(inner(), clipper)
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]

        def step(grads: Any) -> Any:
            optimizer.update(model, grads)
            return optimizer.report.arrays

        call: Any = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
        skipped = []
        for norm in norms:
            bad = norm > 2 or math.isnan(norm)  # on one rank, which is enough for all
            own = 1.0 if bad and world.rank < N - 1 else norm
            arrays = call({"weight": mx.full((2, 3), own), "bias": mx.full((2,), own)})
            mx.eval(state, arrays)
            skipped.append(bool(arrays["skipped"].item()))
        return model, optimizer, skipped

    good = [1.0 + 0.1 * (i % 4) for i in range(9)]
    expected, plain, _ = trained(good)
    model, optimizer, skipped = trained([*good[:5], 50.0, *good[5:7], 1e30, math.nan, *good[7:]])
    assert [i for i, bad in enumerate(skipped) if bad] == [5, 8, 9]
    assert [optimizer.clipper.state[name].item() for name in ("bad", "spikes", "in_a_row")] == [3, 2, 0]
    assert optimizer.step.item() == 9
    assert bits([model.parameters(), optimizer.optimizer.state]) == bits([expected.parameters(), plain.optimizer.state])
    assert same_bits([expected.parameters() if average else {}, optimizer.clipper.state])


def test_one_rank_with_a_spike_is_a_spike_on_all(world: dc.World) -> None:
    clipper = dc.Clipper(1.0, skip_above=10.0, check="never")
    clipped, report = clipper({"w": mx.array([100.0 if world.rank == N - 1 else 1.0])})
    assert (report.spike.item(), report.finite.item(), clipped["w"].item()) == (True, True, 0.0)
    assert same_bits([report.arrays, clipper.state])


# --------------------------------------------------------------------------------- what a spike teaches the rules


@pytest.mark.parametrize("rule", [dc.AutoClip(50, history=8), dc.ZClip(warm_up=3, max_norm=math.inf), 1.0], ids=str)
def test_a_skipped_norm_teaches_the_threshold_nothing(rule: Any) -> None:
    plain, guarded = clipper_of(None, rule), clipper_of(50.0, rule)
    norms = [1.0 + 0.1 * (i % 4) for i in range(12)]
    expected = run(plain, norms)
    found = run(guarded, [*norms[:6], 1e3, *norms[6:]])
    assert [step["threshold"] for i, step in enumerate(found) if i != 6] == [step["threshold"] for step in expected]
    assert bits(guarded.state["threshold"]) == bits(plain.state["threshold"])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_spike_does_not_blind_the_rule_to_the_next(rule: Any) -> None:
    norms = [1.0 + 0.1 * (i % 4) for i in range(40)] + [1e6, 1.1, 1e6, 1.2, 20.0]
    assert [i for i, step in enumerate(run(clipper_of(rule), norms)) if step["spike"]] == [40, 42, 44]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("times", [5.0, 100.0])
def test_norms_that_stay_higher_end_the_skipping_by_themselves(times: float, rule: Any) -> None:
    norms = [1.0 + 0.1 * (i % 4) for i in range(40)] + [times * (1.0 + 0.1 * (i % 4)) for i in range(100)]
    found = run(clipper_of(rule, max_consecutive_skips=None), norms)
    last = max((i for i, step in enumerate(found) if step["spike"]), default=0)
    assert 40 <= last < 40 + 3 * rule.history
    assert not any(step["spike"] for step in found[last + 1 :])


def test_too_many_spikes_in_a_row_raise_on_every_rank_and_a_program_goes_on() -> None:
    clipper = clipper_of(2.0, 1.0, max_consecutive_skips=2)
    run(clipper, [1.0, 3.0, 3.0, math.nan])
    with pytest.raises(
        FloatingPointError, match=r"3 steps in a row, up to step 4, .* not finite or above skip_above"
    ) as error:
        clipper({"a": mx.array([1.0])})
    assert len(set(told_by_all(str(error.value)))) == 1
    assert run(clipper, [1.0])[0]["skipped"] is False


@alone
def test_norms_that_are_all_but_equal_are_no_spikes() -> None:
    norms = [1.0 + 1e-7 * (i % 2) for i in range(60)]
    assert not any(step["spike"] for step in run(clipper_of(dc.Spike(history=8)), norms))
    assert not any(step["spike"] for step in run(clipper_of(dc.Spike(history=8)), [0.0] * 20))


@alone
def test_a_run_goes_on_with_its_state() -> None:
    whole, first, second = (clipper_of(dc.Spike(history=16), 1.0) for _ in range(3))
    expected = run(whole, TRACE[:60])
    run(first, TRACE[:30])
    second.state = first.state
    assert str(run(second, TRACE[30:60])) == str(expected[30:])
    other = clipper_of(dc.Spike(history=8))
    with pytest.raises(
        ValueError, match=r"state\['skip_above'\] was saved with Spike\(history=16\).* Spike\(history=8\)"
    ):
        other.state = first.state
    older = {name: value for name, value in first.state.items() if name not in ("skip_above", "spikes")}
    later = clipper_of(dc.Spike(history=16), 1.0)
    later.state = older
    assert later({"a": mx.array([1.0])})[1].step.item() == 31


WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: dc.Clipper(skip_above=0), ValueError, "skip_above should be > 0, or None for no limit, 0 was"),
    (lambda: dc.Clipper(skip_above=-1.0), ValueError, r"skip_above should be >= 0, -1\.0 was"),
    (lambda: dc.Clipper(skip_above=cast(Any, "6")), TypeError, r"skip_above is '6'; pass .* such as dc\.Spike\(\)"),
    (lambda: dc.Clipper(skip_above=dc.AdaGC()), TypeError, "skip_above is AdaGC.*, which limits groups"),
    (lambda: dc.Clipper(skip_above=2.0, nonfinite="zero"), ValueError, "skip_above needs nonfinite='skip', 'zero' was"),
    (lambda: dc.Spike(6.0, 10.0), ValueError, "Spike takes a z_score or a ratio, not both"),
    (lambda: dc.Spike(0), ValueError, r"z_score should be > 0, 0 was"),
    (lambda: dc.Spike(ratio=1), ValueError, "ratio should be > 1, 1 was"),
    (lambda: dc.Spike(history=1), ValueError, "history should be at least 2, 1 was"),
]


@alone
@pytest.mark.parametrize(("make", "kind", "said"), WRONG, ids=[said for _, _, said in WRONG])
def test_a_wrong_argument_is_said_so(make: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        make()
