"""What users pass: numbers of NumPy are as good as Python's, and a mistake is one sentence that says what to pass."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from reference import WORLD, Array, alone, leaves, line, mesh, norm64, normal, relative, wide
from schemes import N

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


# ------------------------------------------------------------------------- groups, models, swapped arguments


def tree() -> dict[str, mx.array]:
    return {"w": normal((3,), WORLD.rank)}


def test_a_group_may_be_a_world_or_the_name_of_an_axis(world: dc.World) -> None:
    mesh(x=WORLD.size)
    for group in (world, world.group, "x", None):
        assert relative(dc.global_norm(tree(), group=group), norm64([normal((3,), r) for r in range(N)])) <= 1e-6
        mean = norm64(sum(normal((3,), r) for r in range(N)) / N)
        for result in (
            dc.global_norm(dc.average_gradients(tree(), group), layout=dc.Replicated()),
            dc.average_and_clip(tree(), 1.0, group=group)[1],
            dc.Clipper(1.0, average=True if group is None else group)(tree())[1].norm,
        ):
            assert relative(result, mean) <= 1e-6
        clipper = dc.Clipper(1.0, group=group, average=None)
        assert relative(clipper(tree())[1].norm, norm64([normal((3,), r) for r in range(N)])) <= 1e-6


def test_a_number_or_a_rule_makes_a_clipper() -> None:
    model = nn.Linear(3, 1, bias=False)
    for rule in (0.5, np.float64(0.5), dc.AutoClip(), optim.cosine_decay(1.0, 10)):
        optimizer = dc.ClippedOptimizer(optim.SGD(0.1), rule)
        optimizer.clipper.max_consecutive_skips = 3
        optimizer.clipper._check = False
        optimizer.update(model, {"weight": mx.ones((1, 3))})
        assert optimizer.report.finite.item()


MODEL, SGD, CLIPPER = nn.Linear(2, 2), optim.SGD(0.1), dc.Clipper(1.0)
LOSS_AND_GRAD = nn.value_and_grad(MODEL, lambda x: MODEL(x).sum())
FIRST, SECOND = "optimizer is {}; pass an optimizer of MLX first, and then the clipper", "max_norm is {}; pass a number"
HERE = "A {} is passed where the gradients should be: pass the second of the results of nn.value_and_grad"
Call = Callable[..., Any]  # any arguments, so that type checkers, which see most of these mistakes, let them pass
clip: Call = dc.clip_grad_norm
clipped: Call = dc.ClippedOptimizer
clipper: Call = dc.Clipper
# What people write, and what it says; None: it works.
HABITS: dict[str, tuple[Call, str | None]] = {
    "the world as a group": (lambda: clip(tree(), 1.0, group=dc.init()), None),
    "an axis as a group": (lambda: line() and clip(tree(), 1.0, group="x"), None),
    "no axis": (
        lambda: dc.average_gradients(tree(), "nowhere"),
        "group is 'nowhere'; pass a group, such as ",
    ),
    "a mesh as a group": (
        lambda: clip(tree(), 1.0, group=line()),
        r"group is Mesh\(x=1\); pass a group, such as ",
    ),
    "average over the world": (lambda: clipper(average=dc.init())(tree()), None),
    "average over an axis": (lambda: line() and clipper(average="x")(tree()), None),
    "average over a number": (lambda: clipper(average=1), "average is 1; pass a group"),
    "average over a mesh": (lambda: clipper(average=line()), r"average is Mesh\(x=1\); pass a group"),
    "a number as clipper": (lambda: clipped(SGD, 1.0), None),
    "a rule as clipper": (lambda: clipped(SGD, dc.ZClip()), None),
    "a class as clipper": (lambda: clipped(SGD, dc.Clipper), SECOND.format("<class '.*Clipper'>")),
    "no clipper": (lambda: clipped(SGD, None), SECOND.format("None")),
    "clipper first": (lambda: clipped(CLIPPER, SGD), FIRST.format("Clipper.*")),
    "number first": (lambda: clipped(1.0, SGD), FIRST.format("1.0")),
    "model first": (lambda: clipped(MODEL, 1.0), FIRST.format("a model")),
    "a class as optimizer": (lambda: clipped(optim.SGD, 1.0), FIRST.format("<class '.*SGD'>")),
    "clip an optimizer": (lambda: clipper(SGD), SECOND.format("<.*SGD.*>") + ", a schedule"),
    "a class as rule": (lambda: clipper(dc.AutoClip), SECOND.format("<class '.*AutoClip'>")),
    "a model as threshold": (lambda: clipper(MODEL), SECOND.format("a model")),
    "a text as threshold": (lambda: clipper("1.0"), SECOND.format("'1.0'")),
    "a text as max_norm": (lambda: clip(tree(), "1.0"), SECOND.format("'1.0'")),
    "None as max_norm": (lambda: clip(tree(), None), SECOND.format("None")),
    "max_norm first": (lambda: clip(1.0, tree()), "max_norm is a dictionary; pass the gradients first"),
    "max_norm first, average": (lambda: dc.average_and_clip(1.0, tree()), "pass the gradients first"),  # type: ignore[arg-type]
    "a number as gradient": (
        lambda: clip(1.0, 1.0),
        r"^The gradient is 1\.0 of type float; a gradient must",
    ),
    "a model as layout": (lambda: clip(tree(), 1.0, layout=MODEL), r"The layout is a model; .*layout_of\("),
    "a text as layout": (lambda: clip(tree(), 1.0, layout="tp"), r"The layout is 'tp'; pass .*Sharded\('tp'\)"),
    "a mesh as layout": (lambda: clip(tree(), 1.0, layout=line()), r"The layout is Mesh\(x=1\); pass a placement"),
    "a class as layout": (
        lambda: clip(tree(), 1.0, layout=dc.Sharded),
        r"The layout is the class Sharded; pass",
    ),
    "None as layout": (lambda: clip(tree(), 1.0, layout=None), "The layout is None; pass a placement"),
    "layout of a clipper": (lambda: clipper(layout="tp"), "The layout is 'tp'; pass"),
    "model and mesh swapped": (lambda: dc.layout_of(line(), MODEL), "model is Mesh.*; pass an nn.Module"),  # type: ignore[arg-type]
    "loss and gradient": (
        lambda: clip(LOSS_AND_GRAD(mx.ones((1, 2))), 1.0),
        "The gradients are a pair of a number",
    ),
    "a function": (lambda: clip(LOSS_AND_GRAD, 1.0), HERE.format("function")),
    "clip a model": (lambda: clip(MODEL, 1.0), HERE.format("model")),
    "clip a model's values": (lambda: dc.clip_grad_value(MODEL, 1.0), HERE.format("model")),
    "scale a model": (lambda: dc.clip_grads_with_norm(MODEL, 1.0, 2.0), HERE.format("model")),
    "average a model": (lambda: dc.average_gradients(MODEL), HERE.format("model")),
    "clipper of a model": (lambda: CLIPPER(MODEL), HERE.format("model")),
    "model last": (lambda: clipped(SGD, 1.0).update(tree(), MODEL), HERE.format("model")),
    "a text as dtype": (lambda: clipper(communication_dtype="bfloat16"), "communication_dtype should be a floating dt"),
    "a text as every": (lambda: dc.Recorder(None, every="2"), "every is '2'; pass a number"),  # type: ignore[arg-type]
    "negative bytes": (lambda: clipper(bucket_bytes=-1), "bucket_bytes should be at least 0, -1"),
}


@alone
@pytest.mark.parametrize("name", HABITS)
def test_what_people_write_works_or_is_one_sentence(name: str) -> None:
    call, said = HABITS[name]
    if said is None:
        call()
        return
    with pytest.raises((TypeError, ValueError, RuntimeWarning), match=said) as error:
        call()
    assert "\n" not in str(error.value)


@alone
def test_a_loss_among_the_gradients_is_warned_of() -> None:
    loss_and_grad = nn.value_and_grad(MODEL, lambda x: MODEL(x).sum())
    for pair in (loss_and_grad(mx.ones((1, 2))), ((mx.array(1.0), mx.array(3)), {"w": mx.ones(2)})):
        for call in (lambda pair: dc.clip_grad_norm(pair, 1.0), CLIPPER, dc.average_gradients):
            with pytest.warns(RuntimeWarning, match=r"a pair of a number and a dictionary.* loss, grads = "):
                call(pair)  # parameters may be such a pair, so it is done
    for pair in ((mx.ones(1), {"w": mx.ones(2)}), [mx.array(1.0), {"w": mx.ones(2)}], (mx.array(1.0), mx.array(2.0))):
        dc.clip_grad_norm(pair, 1.0)


# --------------------------------------------------------------------------------------- what objects say


@alone
def test_a_repr_is_short_and_true(tmp_path: Path) -> None:
    spike, scale = dc.Spike(ratio=9.0), dc.DynamicLossScale()
    averaging = dc.Clipper(dc.AutoClip(), average=True, layout={"a": dc.Replicated()}, loss_scale=scale)
    with dc.Recorder(tmp_path / "a.jsonl", every=2) as record, dc.Recorder(None) as none, dc.Watchdog(60) as watchdog:
        reprs = {
            dc.Clipper(1.0, skip_above=spike, layout=dc.Sharded("x"), check="never"): (
                "Clipper(max_norm=1.0, skip_above=Spike(ratio=9.0, history=128), layout=Sharded('x'), nonfinite='skip')"
            ),
            averaging: (
                "Clipper(max_norm=AutoClip(percentile=10.0, history=10000), layout=<dict>, average=<group of 1 ranks>, "
                f"nonfinite='skip', loss_scale={scale})"
            ),
            dc.Clipper(optim.cosine_decay(1.0, 10), layout=lambda path, leaf: dc.Replicated()): (
                "Clipper(max_norm=cosine_decay.schedule, layout=test_a_repr_is_short_and_true.<lambda>, "
                "nonfinite='skip')"
            ),
            dc.ClippedOptimizer(optim.AdamW(0.1), 1.0): (
                "ClippedOptimizer(AdamW, Clipper(max_norm=1.0, layout=Sharded(), nonfinite='skip'))"
            ),
            dc.Clipper(1.0)(tree())[1]: "Report(norm, threshold, scale, finite, skipped, clipped, step)",
            dc.init(): "World(rank=0, size=1, backend='none')",
            line(): "Mesh(x=1)",
            dc.ZClip(): "ZClip(alpha=0.97, z_score=2.5, max_norm=1.0, warm_up=25, eps=1e-06)",
            dc.AdaGC(): "AdaGC(ratio=1.05, beta=0.98, warm_up=100, max_norm=1.0)",
            dc.Partial("x"): "Partial('x')",
            record: f"Recorder({str(tmp_path / 'a.jsonl')!r}, every=2)",
            none: "Recorder(every=1)",
            watchdog: "Watchdog(timeout=60)",
        }
        for thing, said in reprs.items():
            assert repr(thing) == said
    assert repr(dc.read_records(tmp_path / "a.jsonl")) == "<Records of 0 steps, 0 dropped, 0 lines damaged>"


@alone
def test_a_repr_evaluates_no_array() -> None:
    made: list[str] = []

    def make(x: mx.array) -> mx.array:
        made.extend(repr(thing) for thing in (dc.Clipper(x), dc.ZClip(max_norm=x), dc.AdaGC(max_norm=x)))  # type: ignore[arg-type]
        made.append(repr(dc.Clipper(1.0, loss_scale=x)))
        made.append(repr(dc.Clipper(1.0, check="never")({"w": x})[1]))
        return x

    mx.compile(make)(mx.array(1.0))  # where an array has no value yet
    assert made[0] == "Clipper(max_norm=array(float32, shape=()), layout=Sharded(), nonfinite='skip')"
    assert "max_norm=array(float32, shape=())" in made[1]


@alone
def test_a_report_of_a_compiled_step_says_where_its_numbers_are() -> None:
    model, optimizer = nn.Linear(2, 1, bias=False), dc.ClippedOptimizer(optim.SGD(0.1), 1.0)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(grads: Any) -> Any:
        optimizer.update(model, grads)
        return optimizer.report.norm, optimizer.report.arrays

    norm, arrays = step({"weight": mx.array([[3.0, 4.0]])})
    for look in (lambda: optimizer.report.norm, lambda: optimizer.report.to_dict()):
        with pytest.raises(RuntimeError, match=r"inside a function that mx.compile traced.*clipper\.state\['norm'\]"):
            look()
    assert (norm.item(), optimizer.clipper.report(arrays).norm.item()) == (5.0, 5.0)
    assert optimizer.clipper.state["norm"].item() == 5.0
    assert repr(optimizer.report).startswith("Report(norm, ")


@alone
def test_a_state_has_the_last_step() -> None:
    for rule, shape in ((1.0, ()), (dc.AdaGC(), (2,))):
        clipper = dc.Clipper(rule, check="never")
        _, report = clipper({"a": mx.array([3.0]), "b": mx.array([4.0])})
        for name in ("norm", "scale", "finite", "step", *(["group_norms"] if shape else [])):
            assert mx.array_equal(clipper.state[name], report.arrays[name])
        assert clipper.state["scale"].shape == shape
