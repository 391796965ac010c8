"""Every optimizer of a program is clipped while the context is open, and is what it was afterwards."""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from launching import alone
from mlx.optimizers import SGD, Optimizer, clip_grad_norm  # names that were imported before
from mlx.utils import tree_flatten, tree_unflatten

import distclip as dc

LENGTH = 6  # of the gradient that is bad
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: SGD(0.1, momentum=0.9),
    "AdamW": lambda: optim.AdamW(optim.cosine_decay(1e-2, 8), bias_correction=True),
    "Adafactor": lambda: optim.Adafactor(),
    "Muon": lambda: optim.Muon(1e-2),
    "MultiOptimizer": lambda: optim.MultiOptimizer(
        [optim.Muon(1e-2), optim.Adam(optim.linear_schedule(1e-2, 1e-3, 5))], [lambda path, _: "w" in path]
    ),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = mx.random.normal((4, 4), key=mx.random.key(1))
        self.layers = [{"b": mx.ones(4)}]


def gradient(step: int, good: bool = True) -> dict[str, Any]:
    w, b = (mx.random.normal(shape, key=mx.random.key(10 * step + i)) for i, shape in enumerate([(4, 4), (4,)]))
    return {"w": w if good else w * math.nan, "layers": [{"b": b}]}


def gradients() -> list[dict[str, Any]]:
    return [gradient(step, good=step not in (1, 4)) for step in range(LENGTH)]


def bits(tree: Any) -> dict[str, Any]:
    flat: Any = tree_flatten(tree)
    return {path: np.array(leaf).tobytes() for path, leaf in flat}


def trained(
    optimizer: Any,
    grads: list[Any],
    *,
    compiled: bool = False,
    model: Any = None,
    change: Callable[[Any], Any] = lambda grads: grads,
) -> tuple[Any, Any]:
    """The bits of the model and of the optimizer's state, after a step with each gradient, changed first."""
    model = model or Model()
    state = [model.state, optimizer.state]

    def step(grads: Any) -> None:
        optimizer.update(model, change(grads))

    run: Any = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for each in grads:
        run(each)
        mx.eval(model.state, optimizer.state)
    return bits(model), bits(optimizer.state)


def by_wrapping(optimizer: Any, grads: list[Any], max_norm: float, compiled: bool = False) -> tuple[Any, Any]:
    clipper = dc.Clipper(max_norm, layout=dc.Replicated(), check="never")
    model, wrapped = Model(), dc.ClippedOptimizer(optimizer, clipper)
    wrapped.init(model.trainable_parameters())
    return trained(wrapped, grads, compiled=compiled, model=model)[0], bits(optimizer.state)


def without_clipper(state: dict[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in state.items() if "distclip." not in path}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_a_clipped_optimizer_to_the_bit(name: str, compiled: bool) -> None:
    expected = by_wrapping(OPTIMIZERS[name](), gradients(), 0.5, compiled)
    assert expected[0] == by_wrapping(OPTIMIZERS[name](), [gradient(i) for i in (0, 2, 3, 5)], 0.5, compiled)[0]
    optimizer = OPTIMIZERS[name]()
    with dc.clipped_optimizers(0.5) as clipping:
        parameters, state = trained(optimizer, gradients(), compiled=compiled)
    assert (parameters, without_clipper(state)) == expected
    assert len(state) > len(expected[1])
    assert (clipping.steps, clipping.clipped, clipping.skipped) == (6, 4, 2)


def test_rank_0_says_what_was_skipped_and_how_it_went(world: dc.World, capsys: pytest.CaptureFixture[str]) -> None:
    with dc.clipped_optimizers(0.5, average=True) as clipping:
        trained(SGD(0.1), gradients())
    told = capsys.readouterr().out.splitlines()
    if world.rank > 0:
        assert told == []
        return
    assert told == [
        "distclip: the norm of step 2 is nan; the step was skipped",
        "distclip: the norm of step 5 is nan; the step was skipped",
        f"distclip: 6 steps, 67% clipped, 2 skipped, last norm {clipping.norm:.4g}",
    ]


def test_each_step_is_reported() -> None:
    reports: list[dict[str, Any]] = []
    with dc.clipped_optimizers(0.5, skip_above=4.0, on_step=lambda report: reports.append(report.to_dict())):
        trained(SGD(0.1), gradients())
        assert len(reports) == LENGTH  # mx.eval was given the optimizer's state
    norms = [
        np.sqrt(sum(np.square(np.array(x, np.float64)).sum() for _, x in flat)) for flat in map(leaves, gradients())
    ]
    np.testing.assert_allclose([report["norm"] for report in reports], norms, rtol=1e-6)
    assert [report["step"] for report in reports] == list(range(1, LENGTH + 1))
    assert [report["skipped"] for report in reports] == [not norm <= 4 for norm in norms]


def leaves(tree: Any) -> list[tuple[str, mx.array]]:
    return tree_flatten(tree)  # type: ignore[return-value]


def test_a_compiled_step_is_read_after_the_program_has_evaluated_it_and_not_before() -> None:
    model, optimizer, seen = Model(), optim.Adam(1e-2), list[dc.Report]()
    state = [model.state, optimizer.state]
    step = mx.compile(lambda grads: optimizer.update(model, grads), inputs=state, outputs=state)
    with dc.clipped_optimizers(on_step=seen.append):
        step(gradient(0))
        mx.eval(mx.zeros(1), model.parameters())
        assert seen == []
        mx.eval(state)
        assert len(seen) == 1
        step(gradient(1))
        assert len(seen) == 1
    assert len(seen) == 2


# ------------------------------------------------------------------------------ what programs do


class Doubling(SGD):
    """With an apply_gradients and an update of its own."""

    def apply_gradients(self, grads: Any, params: Any) -> Any:
        return super().apply_gradients(nn.utils.tree_map(lambda g: 2 * g, grads), params)

    def update(self, model: Any, grads: Any) -> str:
        super().update(model, grads)
        return "done"


class InPlace(SGD):
    """Its update calls no apply_gradients."""

    def update(self, model: Any, gradients: Any) -> None:
        model.update({"w": model.w - gradients["w"], "layers": gradients["layers"]})
        self.state["momentum"] = self.state.get("momentum", mx.array(0)) + 1


def test_overrides_are_clipped_once_and_before() -> None:
    grads, norm = clip_grad_norm(gradient(0), 0.5)
    expected = Model()
    SGD(0.2).update(expected, grads)
    with dc.clipped_optimizers(0.5) as clipping:
        model = Model()
        assert Doubling(0.1).update(model, gradient(0)) == "done"
        np.testing.assert_allclose(model.w, expected.w, rtol=1e-5)
        model = Model()
        model.update(Doubling(0.1).apply_gradients(grads=gradient(0), params=model))
        np.testing.assert_allclose(model.w, expected.w, rtol=1e-5)
    assert clipping.norm == pytest.approx(norm.item(), rel=1e-5)


def test_a_skipped_update_in_place_is_undone() -> None:
    with dc.clipped_optimizers(0.5):
        model, optimizer = Model(), InPlace(0.1)
        optimizer.update(model, gradient(0))
        before = bits(model), without_clipper(bits(optimizer.state))
        optimizer.update(model, gradient(1, good=False))
        assert (bits(model), without_clipper(bits(optimizer.state))) == before
        optimizer.update(model, gradient(2))
        assert bits(model) != before[0]
        assert optimizer.state["momentum"].item() == 2


def test_an_optimizer_may_replace_its_state() -> None:
    class Replacing(SGD):
        def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
            updated = super().apply_gradients(gradients, parameters)
            self._state = dict(self._state)
            return updated

    optimizer = Replacing(0.1)
    with dc.clipped_optimizers(0.5) as clipping:
        trained(optimizer, gradients())
    assert (clipping.steps, clipping.skipped) == (6, 2)
    assert "distclip" not in optimizer.state


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_program_may_catch_what_its_optimizer_raises(compiled: bool) -> None:
    class Failing(SGD):
        def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
            raise RuntimeError("of the optimizer")

    with dc.clipped_optimizers(0.5) as clipping:
        with pytest.raises(RuntimeError, match="of the optimizer"):
            trained(Failing(0.1), [gradient(0)], compiled=compiled)
        trained(SGD(0.1), gradients())
    assert clipping.steps == LENGTH + (not compiled)


def test_a_program_may_free_its_model(world: dc.World) -> None:
    model, optimizer = Model(), SGD(0.1)
    with dc.clipped_optimizers(0.5):
        trained(optimizer, [gradient(0)], model=model)
        model_is_alive = weakref.ref(model)
        del model
        gc.collect()
        assert (model_is_alive() is None) == (world.size == 1)  # with several ranks it is compared at the end


def test_classes_that_are_made_later_are_clipped_too() -> None:
    with dc.clipped_optimizers(0.5) as clipping:

        class Late(Doubling):
            def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
                assert "distclip" not in self.state  # it knows nothing of that
                return nn.utils.tree_map(lambda g, p: p - g, gradients, parameters)

        optimizer, model = Late(0.1), Model()
        assert isinstance(optimizer, Optimizer)
        for _ in range(2):
            optimizer.update(model, gradient(0))
    assert clipping.steps == 2
    np.testing.assert_allclose(model.w, Model().w - 2 * clip_grad_norm(gradient(0), 0.5)[0]["w"], rtol=1e-5)
    late = Late(0.1)
    late.update(Model(), gradient(0, good=False))
    assert "distclip" not in late.state


def test_what_cannot_be_undone_in_a_compiled_step_gets_zeros(
    world: dc.World, capsys: pytest.CaptureFixture[str]
) -> None:
    class Counting(SGD):
        def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
            self.state["calls"] = self.state.get("calls", mx.array(0)) + 1
            return super().apply_gradients(gradients, parameters)

    model = Model()
    with dc.clipped_optimizers(0.5, average=True) as clipping:
        trained(Counting(0.1), gradients(), compiled=True, model=model)
    assert clipping.steps == LENGTH
    assert mx.all(mx.isfinite(model.w)).item()
    if world.rank == 0:
        assert (
            "step of Counting cannot be undone in mx.compile, since it makes 'calls' in its state"
            in capsys.readouterr().out
        )


def test_an_update_in_place_that_cannot_be_undone_in_a_compiled_step_is_made_once() -> None:
    class Counting(SGD):
        def update(self, model: Any, gradients: Any) -> None:
            self.state["calls"] = self.state.get("calls", mx.array(0)) + 1
            super().update(model, gradients)

    expected, _ = trained(Counting(0.1), [gradient(0)], compiled=True)
    with dc.clipped_optimizers(100.0):
        assert trained(Counting(0.1), [gradient(0)], compiled=True)[0] == expected


def test_too_many_bad_steps_end_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = Model(), optim.Adam(1e-2)
    before = bits(model)
    with dc.clipped_optimizers(max_consecutive_skips=2), pytest.raises(FloatingPointError, match="3 steps in a row"):
        trained(optimizer, [gradient(0, good=False)] * 5, compiled=True, model=model)
    assert bits(model) == before


@pytest.mark.parametrize("zero", [0, 0.0])
def test_a_max_norm_of_0_clips_nothing_and_skips(zero: float) -> None:
    with dc.clipped_optimizers(zero) as clipping:
        parameters, _ = trained(SGD(0.1), gradients())
    assert parameters == trained(SGD(0.1), [gradient(i) for i in (0, 2, 3, 5)])[0]
    assert (clipping.clipped, clipping.skipped) == (0, 2)


# ----------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_checkpoint_of_the_optimizer_carries_the_clipper(compiled: bool, tmp_path: Path) -> None:
    file = str(tmp_path / "optimizer.safetensors")
    grads = [gradient(step) for step in range(LENGTH)]
    with dc.clipped_optimizers(dc.AutoClip(50)):
        whole, _ = trained(optim.Adam(1e-2), grads, compiled=compiled)
    with dc.clipped_optimizers(dc.AutoClip(50)):
        model, optimizer = Model(), optim.Adam(1e-2)
        trained(optimizer, grads[:3], compiled=compiled, model=model)
        mx.save_safetensors(file, dict(leaves(optimizer.state)))
    with dc.clipped_optimizers(dc.AutoClip(50)) as clipping:
        resumed = optim.Adam(1e-2)
        resumed.state = tree_unflatten(list(mx.load(file).items()))  # type: ignore[union-attr]
        assert trained(resumed, grads[3:], compiled=compiled, model=model)[0] == whole
    assert clipping.steps == LENGTH


def test_a_checkpoint_without_a_clipper_loads() -> None:
    model, optimizer = Model(), optim.Adam(1e-2)
    trained(optimizer, [gradient(0)], model=model)
    with dc.clipped_optimizers(0.5) as clipping:
        resumed = optim.Adam(1e-2)
        resumed.state = tree_unflatten(leaves(optimizer.state))
        trained(resumed, gradients(), model=model)
        assert resumed.step.item() == 5
        resumed.state = tree_unflatten(leaves(optimizer.state))  # another, into the same optimizer
        trained(resumed, [gradient(0)], model=model)
    assert clipping.steps == 1


# ------------------------------------------------------------------------- in, out, and in again


def test_everything_is_as_it_was_afterwards() -> None:
    def everything() -> Any:
        gc.collect()
        classes = [Optimizer, *every_subclass(Optimizer), dc.ClippedOptimizer, dc.Clipper]
        modules = {
            name: vars(module) for name, module in sys.modules.items() if name.split(".")[0] in ("mlx", "distclip")
        }
        modules[__name__] = globals()
        functions = {
            (name, key): id(value) for name, names in modules.items() for key, value in names.items() if callable(value)
        }
        return {cls: dict(vars(cls)) for cls in classes}, functions

    def every_subclass(cls: type) -> list[type]:
        subclasses: list[type] = cls.__subclasses__()
        return [new for sub in subclasses for new in (sub, *every_subclass(sub))]

    optimizer = SGD(0.1)
    before = everything()
    kept: Any = None

    def program() -> None:
        nonlocal kept
        trained(optimizer, [gradient(0)])
        kept = optimizer.update
        assert "distclip" in optimizer.state
        assert clip_grad_norm is optim.clip_grad_norm
        raise RuntimeError("of the program")

    with pytest.raises(RuntimeError, match="of the program"), dc.clipped_optimizers():
        program()
    assert everything() == before
    assert "distclip" not in optimizer.state
    model = Model()
    kept(model, gradient(0, good=False))
    assert not mx.all(mx.isfinite(model.w)).item()


def test_a_compiled_step_goes_on_afterwards_and_in_another_context() -> None:
    def train(*contexts: Any) -> Any:
        model, optimizer = Model(), SGD(0.1, momentum=0.9)
        state = [optimizer.state, model.state, mx.random.state]

        def step(grads: Any) -> None:
            optimizer.update(model, grads)

        run: Any = mx.compile(step, inputs=state, outputs=state)
        for i, context in enumerate(contexts):
            with context as clipping:
                for j in range(3):
                    run(gradient(3 * i + j))
                    mx.eval(state)
            assert clipping is None or clipping.steps == 3
        return model

    def clipped(max_norm: float) -> Any:
        return dc.clipped_optimizers(max_norm)

    plain = contextlib.nullcontext
    model = train(clipped(0.5), plain(), clipped(0.25), clipped(0.5), plain())
    expected, optimizer = Model(), SGD(0.1, momentum=0.9)
    for i, max_norm in enumerate([0.5, math.inf, 0.25, 0.5, math.inf]):
        for j in range(3):
            optimizer.update(expected, clip_grad_norm(gradient(3 * i + j), max_norm)[0])
    np.testing.assert_allclose(model.w, expected.w, rtol=1e-4)
    np.testing.assert_allclose(model.layers[0]["b"], expected.layers[0]["b"], rtol=1e-4)


@pytest.mark.launches
def test_a_forked_child_ends_at_once(tmp_path: Path) -> None:
    program = """
    import os, signal, sys
    import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
    import distclip as dc

    model, optimizer = nn.Linear(2, 1), optim.SGD(0.1)
    with dc.clipped_optimizers():
        for _ in range(2):
            optimizer.update(model, model.parameters())
        if os.fork() == 0:
            signal.alarm(20)
            sys.exit(0)
        print("child:", os.wait()[1])
    """
    ended = alone(program, tmp_path)
    assert ended.output.splitlines()[0] == "child: 0"
    assert ended.output.count("2 steps") == 1


def test_entering_twice_is_entering_once(capsys: pytest.CaptureFixture[str]) -> None:
    with dc.clipped_optimizers(0.5, nonfinite="zero") as outer:
        with dc.clipped_optimizers(0.5, nonfinite="zero") as inner:
            trained(SGD(0.1), [gradient(0)])
        assert inner is outer
        trained(SGD(0.1), [gradient(1)])
        with pytest.raises(ValueError, match=r"clipped already, with max_norm=0\.5, nonfinite='zero'.* not max_norm=2"):
            dc.clipped_optimizers(2.0).__enter__()
    assert outer.steps == 2
    assert capsys.readouterr().out.count(" steps, ") <= 1


@pytest.mark.parametrize("options", [{"max_norm": -1.0}, {"nonfinite": "stop"}, {"clip": 1}])
def test_wrong_options_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        dc.clipped_optimizers(**options).__enter__()
    assert "distclip" not in trained(SGD(0.1), [gradient(0)])[1]


# ----------------------------------------------------------------- programs that clip by themselves


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out: str = capsys.readouterr().out
    every = dc.init().gather(out)
    assert not any(every[1:])
    return every[0]


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("mlx.optimizers.clip_grad_norm", lambda grads: clip_grad_norm(grads, 1.0)[0]),
        ("dc.clip_grad_norm", lambda grads: dc.clip_grad_norm(grads, 1.0, layout=dc.Replicated())[0]),
        ("dc.Clipper", lambda grads: dc.Clipper(1.0, layout=dc.Replicated())(grads)[0]),
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_clipping_twice_is_said(name: str, clip: Any, compiled: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def program() -> None:
        trained(SGD(0.1), [gradient(i) for i in range(3)], compiled=compiled, change=clip)

    with dc.clipped_optimizers(0.5):
        program()
    assert said(capsys).count(f"clips its gradients itself with {name}, so they are clipped twice") == 1
    with dc.clipped_optimizers(0):
        program()
    assert "twice" not in said(capsys)


def test_a_clipped_optimizer_is_left_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    expected = by_wrapping(SGD(0.1), gradients(), 1.0)
    with dc.clipped_optimizers(0.5) as clipping:
        assert by_wrapping(SGD(0.1), gradients(), 1.0) == expected
    assert clipping.steps == 0
    assert said(capsys).endswith("a dc.ClippedOptimizer of its own, and its steps are left to that\n")


def test_a_program_without_an_optimizer_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with dc.clipped_optimizers():
        pass
    assert said(capsys) == "distclip: no optimizer of mlx.optimizers made a step here, so nothing was clipped\n"


# --------------------------------------------------------------------------------- several ranks


def own(step: int) -> Any:
    """A gradient of this rank's batch."""
    return gradient(100 * dc.init().rank + step)


def data_parallel(average: Callable[[Any], Any], *, compiled: bool, model: Any = None) -> Any:
    return trained(optim.Adam(1e-2), [own(i) for i in range(4)], compiled=compiled, model=model, change=average)[0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "average",
    [
        lambda grads: nn.average_gradients(grads),
        lambda grads: dc.average_gradients(grads),
        lambda grads: nn.utils.tree_map(lambda g: mx.distributed.all_sum(g) / dc.init().size, grads),
    ],
    ids=["nn", "dc", "all_sum"],
)
def test_averages_are_seen_and_nothing_is_said(
    average: Any, compiled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with dc.clipped_optimizers(0.5):
        mine = data_parallel(average, compiled=compiled)
    assert said(capsys).startswith("distclip: 4 steps, 100% clipped")
    assert len(set(map(str, dc.init().gather(str(mine))))) == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_forgotten_average_is_said_or_made(
    compiled: bool, world: dc.World, capsys: pytest.CaptureFixture[str]
) -> None:
    with dc.clipped_optimizers(0.5):
        data_parallel(lambda grads: grads, compiled=compiled)
    told, several = said(capsys), world.size > 1
    assert told.count(f"step averages no gradients over the {world.size} ranks") == several
    assert told.count("at the end the parameters differ between ranks, in 'layers.0.b', 'w'") == several
    with dc.clipped_optimizers(0.5):
        expected = data_parallel(nn.average_gradients, compiled=False)
    said(capsys)
    with dc.clipped_optimizers(0.5, average=True):
        mine = data_parallel(lambda grads: grads, compiled=compiled)
    assert mine.keys() == expected.keys()
    for path in mine:
        np.testing.assert_allclose(
            np.frombuffer(mine[path], np.float32), np.frombuffer(expected[path], np.float32), 1e-4
        )
    assert said(capsys).startswith("distclip: 4 steps, 100% clipped")


def test_gradients_that_differ_though_ranks_communicate_are_said(
    world: dc.World, capsys: pytest.CaptureFixture[str]
) -> None:
    def average_one(grads: Any) -> Any:
        return grads | nn.average_gradients({"w": grads["w"]})

    with dc.clipped_optimizers(0.5):
        data_parallel(average_one, compiled=False)
    told = said(capsys)
    assert told.count("the gradients of the first step differ between ranks, in 'layers.0.b'. ") == (world.size > 1)


@pytest.mark.parametrize("lazy", [False, True])
def test_one_rank_may_train_for_all(lazy: bool, world: dc.World, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = Model(), SGD(0.1)
    with dc.clipped_optimizers(0.5) as clipping:
        for i in range(3):
            grads = nn.utils.tree_map(lambda g: mx.distributed.all_sum(g) / world.size, own(i))
            if not lazy or world.rank > 0:
                mx.eval(grads)
            if world.rank == 0:
                optimizer.update(model, grads)
            mine = model.parameters() if world.rank == 0 else nn.utils.tree_map(mx.zeros_like, model.parameters())
            model.update(nn.utils.tree_map(mx.distributed.all_sum, mine))
            mx.eval(model.state, optimizer.state)
    assert clipping.steps == (3 if world.rank == 0 else 0)
    assert len(set(world.gather(str(bits(model))))) == 1
    assert "differ" not in said(capsys)


def test_a_rank_may_train_something_of_its_own_first(world: dc.World, capsys: pytest.CaptureFixture[str]) -> None:
    with dc.clipped_optimizers(0.5) as clipping:
        if world.rank == 0:
            trained(SGD(0.1), [gradient(0)])
        data_parallel(nn.average_gradients, compiled=False)
    assert clipping.steps == 4 + (world.rank == 0)


def test_one_rank_may_train_with_what_another_sends(world: dc.World, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer, last = Model(), SGD(0.1), world.size - 1
    with dc.clipped_optimizers(0.5):
        for _ in range(3 if world.backend == "mpi" else 0):
            if world.rank == 0:
                mx.eval(mx.distributed.send(mx.ones((4, 4)), last, stream=world.stream))
            if world.rank == last:
                w = mx.distributed.recv((4, 4), mx.float32, 0, stream=world.stream)
                optimizer.update(model, {"w": w, "layers": [{"b": mx.ones(4)}]})
                mx.eval(model.state, optimizer.state)
    told = said(capsys)
    assert "averages no gradients" not in told
    assert "differ" not in told


def test_a_thread_that_may_not_communicate_does_not(world: dc.World, capsys: pytest.CaptureFixture[str]) -> None:
    def train() -> Any:
        with dc.clipped_optimizers(0.5) as clipping:
            data_parallel(lambda grads: grads, compiled=False)
        return clipping

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(train).result().steps == 4
    assert "differ" not in said(capsys)


def test_parameters_that_began_apart_are_said(world: dc.World, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    model.w = model.w + world.rank
    with dc.clipped_optimizers(0.5):
        data_parallel(nn.average_gradients, compiled=True, model=model)
    assert said(capsys).count(
        "at the end the parameters differ between ranks, in 'w', though the program averages. "
    ) == (world.size > 1)


def test_one_rank_may_train_alone(world: dc.World, capsys: pytest.CaptureFixture[str]) -> None:
    with dc.clipped_optimizers(0.5) as clipping:
        if world.rank == world.size - 1:
            trained(SGD(0.1), gradients())
    assert clipping.steps == (LENGTH if world.rank == world.size - 1 else 0)


def test_a_layout_is_believed(world: dc.World, capsys: pytest.CaptureFixture[str]) -> None:
    with dc.clipped_optimizers(0.5, layout=dc.Sharded(), check="never") as clipping:
        data_parallel(lambda grads: grads, compiled=False)
    squares = sum(np.square(np.array(x, np.float64)).sum() for x in dict(leaves(own(3))).values())
    everyone = sum(map(float, world.gather(str(squares))))
    assert clipping.norm == pytest.approx(math.sqrt(everyone), rel=1e-5)
    assert said(capsys).count("distclip:") == 1
