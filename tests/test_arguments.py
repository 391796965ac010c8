"""Numbers of NumPy are as good as Python's: nothing is evaluated for them, and what is no number is said so."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from reference import Array, alone, leaves, wide

import distclip as dc

FORMS: dict[str, Callable[[float], Any]] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "0-d": np.array,
    "1-d": lambda x: np.array([x]),
    "fraction": Fraction,
    "int64": lambda x: np.int64(x) if x == int(x) else np.float64(x),
}
NORM = mx.array(5.0)
RULES: dict[str, Callable[[Callable[[float], Any]], Any]] = {
    "max_norm": lambda of: of(2.0),
    "AutoClip": lambda of: dc.AutoClip(of(50.0), history=of(4)),
    "ZClip": lambda of: dc.ZClip(of(0.5), of(2.0), of(3.0), warm_up=of(2), eps=of(0.5)),
    "AdaGC": lambda of: dc.AdaGC(of(1.5), of(0.5), warm_up=of(2), max_norm=of(3.0)),
}
CALLS: dict[str, Callable[[Callable[[float], Any], Any], Any]] = {
    "global_norm": lambda of, g: dc.global_norm(g, norm_type=of(3.0)),
    "clip_grad_norm": lambda of, g: dc.clip_grad_norm(g, of(2.0), norm_type=of(2.0)),
    "clip_grad_norm, p": lambda of, g: dc.clip_grad_norm(g, of(2.0), norm_type=of(3.0)),
    "clip_grads_with_norm": lambda of, g: dc.clip_grads_with_norm(g, of(2.0), of(5.0)),
    "clip_grad_value": lambda of, g: dc.clip_grad_value(g, of(2.0)),
    "average_gradients": lambda of, g: dc.average_gradients(g, bucket_bytes=of(1024)),
    "average_and_clip": lambda of, g: dc.average_and_clip(g, of(2.0), norm_type=of(3.0), bucket_bytes=of(0)),
    "adaptive_clip_grad": lambda of, g: dc.adaptive_clip_grad(g, g, of(0.5), eps=of(0.5)),
}


def grads() -> dict[str, mx.array]:
    return {"a": mx.array([3.0, -4.0, 1.0]), "b": mx.array([[0.5, 2.0]])}


def values(tree: Any) -> list[Array]:
    return [wide(leaf) for leaf in leaves(tree)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_any_number_serves_without_an_evaluation(name: str, form: Callable[[float], Any]) -> None:
    call = CALLS[name]
    expected = values(call(float, grads()))
    call(form, grads())  # the first call may evaluate
    traced = mx.compile(lambda tree: call(form, tree))(grads())  # raises where something is evaluated
    for a, b in zip(values(traced), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", RULES)
def test_any_number_serves_in_a_rule(name: str, form: Callable[[float], Any]) -> None:
    options: dict[str, Any] = {"layout": dc.Replicated(), "check": "never", "average": True}
    found = []
    for of in (float, form):
        limits: Any = {"max_consecutive_skips": of(3), "rank_batch": of(2), "norm_type": of(2)}
        clipper = dc.Clipper(RULES[name](of), **options, **limits)
        clipper.prepare(grads())
        step = mx.compile(
            lambda tree, clipper=clipper: clipper(tree)[1].arrays, inputs=clipper.state, outputs=clipper.state
        )
        found.append([values(step(grads())) for _ in range(4)])
    for plain, other in zip(*found, strict=True):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3)


@alone
@pytest.mark.parametrize("wrong", ["1.0", None, [1.0], np.array([1.0, 2.0]), 1j, mx.ones(2)], ids=repr)
def test_what_is_no_number_is_said_so(wrong: Any) -> None:
    for call, name in (
        (lambda: dc.clip_grad_norm(grads(), wrong), "max_norm"),
        (lambda: dc.average_and_clip(grads(), wrong), "max_norm"),
        (lambda: dc.clip_grads_with_norm(grads(), 1.0, wrong), "norm"),
        (lambda: dc.clip_grad_value(grads(), wrong), "clip_value"),
        (lambda: dc.global_norm(grads(), norm_type=wrong), "norm_type"),
        (lambda: dc.adaptive_clip_grad(grads(), grads(), wrong), "clipping"),
        (lambda: dc.AutoClip(wrong), "percentile"),
        (lambda: dc.ZClip(warm_up=wrong), "warm_up"),
    ):
        with pytest.raises(TypeError, match=rf"^{name} is .*; pass a"):
            call()


@alone
def test_a_wrong_value_is_said_so() -> None:
    with pytest.raises(TypeError, match=r"history is 2\.5; pass a whole number"):
        dc.AutoClip(history=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_norm should be >= 0, -1\.0"):
        dc.clip_grad_norm(grads(), np.float64(-1))
    assert dc.AutoClip(history=1e4) == dc.AutoClip(history=10_000)  # type: ignore[arg-type]


@alone
def test_a_limit_may_be_an_array() -> None:
    compiled = mx.compile(lambda tree, limit: dc.clip_grad_value(tree, limit))
    for limit in (mx.array(1.0), mx.array([1.0])):
        assert compiled(grads(), limit)["a"].tolist() == [1.0, -1.0, 1.0]
        assert dc.clip_grads_with_norm({"a": NORM}, 1.0, limit * 5)["a"].item() == pytest.approx(1.0)
