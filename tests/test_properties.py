"""Random trees, layouts, policies and runs, each beside float64 NumPy: the same examples on every rank."""

from __future__ import annotations

import base64
import math
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from reference import (
    DTYPES,
    EPSILON,
    NORM_ERROR,
    SUM_ERROR,
    WORLD,
    Array,
    assert_close,
    line,
    normal,
    relative,
    same_bits,
    square,
    wide,
)
from reference import (
    leaves as leaves_of,
)

import distclip as dc

N = WORLD.size
RANKS = range(N)

EXAMPLES = int(os.environ.get("DISTCLIP_TEST_EXAMPLES", "40"))

pytestmark = pytest.mark.time_limit(120 + EXAMPLES)


def for_all(*strategies: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """As hypothesis.given, for several ranks: rank 0 draws, and every rank runs the test on what was drawn. What fails
    on one rank fails on all."""

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        def drawn(example: tuple[Any, ...]) -> None:
            WORLD.gather(base64.b64encode(pickle.dumps(example)).decode())
            failures = attempt(test, example)
            assert not failures, failures

        drawn.__name__ = test.__name__  # what derandomize draws depends on it
        profile = settings(
            derandomize=True, max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck)
        )

        def lead() -> None:
            failed = "failed on rank 0"
            try:
                profile(given(st.tuples(*strategies))(drawn))()
                failed = ""
            finally:
                WORLD.gather(f"end {failed}")

        def follow() -> None:
            failures = ""
            while not (told := WORLD.gather("")[0]).startswith("end "):
                failures = attempt(test, pickle.loads(base64.b64decode(told))) or failures
            assert told == "end ", failures

        run = lead if WORLD.rank == 0 else follow
        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def attempt(test: Callable[..., None], example: tuple[Any, ...]) -> str:
    """Run the test, and return what failed on any rank: a rank that goes on alone would wait for ever."""
    try:
        test(*example)
        failed = ""
    except (Exception, pytest.fail.Exception):
        failed = traceback.format_exc()
    return "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(WORLD.gather(failed)) if text)


# ---------------------------------------------------------------------------------------------- gradients of all ranks


MESH = square() if N == 4 else line()  # made by all ranks, before one draws


REAL = ["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Leaf:
    """A leaf of all ranks: "sharded" or "partial" over axes, or "replicated" on some ranks, all if there are none."""

    shape: tuple[int, ...]
    dtype: str
    exponent: int
    kind: str
    axes: tuple[str, ...]
    ranks: tuple[int, ...]
    uneven: bool
    seed: int

    def placement(self) -> Any:
        if self.kind == "sharded":
            return dc.Sharded(*self.axes)
        if self.kind == "partial":
            return dc.Partial(*self.axes)
        return dc.Replicated(self.ranks) if self.ranks else dc.Replicated()

    def is_on(self, rank: int) -> bool:
        return self.kind != "replicated" or not self.ranks or rank in self.ranks

    def block(self, rank: int) -> tuple[int, ...]:
        """Which block, or contribution, a rank holds."""
        if self.kind == "replicated":
            return ()
        place = MESH.coordinates(rank)
        return tuple(place[axis] for axis in self.axes) if self.axes else (rank,)

    def held(self, rank: int) -> mx.array:
        block = self.block(rank)
        shape = self.shape
        if self.uneven and self.kind == "sharded" and shape:
            shape = (shape[0] + sum(block), *shape[1:])
        values = normal(shape, (self.seed, *block), DTYPES[self.dtype], 10.0**self.exponent)
        return mx.abs(values) if self.kind == "partial" else values  # a sum that is far smaller is less exact

    def completed(self, rank: int) -> Array:
        """What a rank holds once contributions are added up, in float64."""
        if self.kind != "partial":
            return wide(self.held(rank))
        others = [r for r in RANKS if not self.axes or self.off(r) == self.off(rank)]
        added: Array = np.stack([wide(self.held(r)) for r in others]).sum(axis=0)
        return added

    def off(self, rank: int) -> dict[str, int]:
        return {axis: at for axis, at in MESH.coordinates(rank).items() if axis not in self.axes}

    def blocks(self) -> list[Array]:
        """Each block of the whole gradient once."""
        if self.kind != "sharded":
            return [self.completed(self.ranks[0] if self.ranks else 0)]
        return [wide(self.held(rank)) for rank in {self.block(rank): rank for rank in RANKS}.values()]


@st.composite
def leaf(draw: Any, partial: bool) -> Leaf:
    kind = draw(st.sampled_from(["sharded", "replicated", *(["partial"] if partial else [])]))
    dtype = draw(st.sampled_from(REAL if kind == "partial" else [*REAL, "complex64", "int32", "bool"]))
    shape = draw(st.one_of(st.lists(st.integers(0, 9), max_size=3), st.sampled_from([[70_000], [300, 257]])))
    exponent = draw(st.integers(-15, 15)) if dtype in ("float32", "bfloat16", "complex64") else 0
    some = draw(st.one_of(st.sets(st.sampled_from(RANKS)), st.just(set(RANKS)))) if kind == "replicated" else set()
    if kind == "partial":
        axes = draw(st.sampled_from([(), *[(axis,) for axis in MESH.axes]]))
    else:
        axes = tuple(axis for axis in MESH.axes if kind == "sharded" and draw(st.booleans()))
    uneven, seed = draw(st.booleans()), draw(st.integers(0, 2**16))
    return Leaf(tuple(shape), dtype, exponent, kind, axes, tuple(sorted(some)), uneven, seed)


def trees(partial: bool = True) -> st.SearchStrategy[list[Leaf]]:
    return st.lists(leaf(partial), max_size=7)


def tree_of(leaves: list[Leaf], held: list[mx.array]) -> dict[str, Any]:
    """A tree of this rank: nested, and without the leaves of other ranks."""
    of_all = enumerate(zip(leaves, held, strict=True))
    return {"blocks": [{f"w{i}": array} if leaf.is_on(WORLD.rank) else {} for i, (leaf, array) in of_all]}


def layout_of(leaves: list[Leaf], called: bool = False) -> Any:
    """A tree, the same on all ranks, or a callable, which sees the leaves of its own rank alone."""
    if called and not any(leaf.ranks for leaf in leaves):
        return lambda path, array: leaves[int(path.split(".")[1])].placement()
    return {"blocks": [{f"w{i}": leaf.placement()} for i, leaf in enumerate(leaves)]}


def norm64(leaves: list[Leaf], p: float) -> float:
    values = [np.abs(block).reshape(-1) for leaf in leaves for block in leaf.blocks()]
    if math.isinf(p):
        return max((float(v.max()) for v in values if v.size), default=0.0)
    top = max((float(v.max()) for v in values if v.size), default=0.0) or 1.0
    return top * math.pow(math.fsum(float(((v / top) ** p).sum()) for v in values), 1 / p)


def error(leaves: list[Leaf], p: float = 2.0) -> float:
    """The relative error that a norm may have: contributions are added up in their own type."""
    rounded = [N * EPSILON[DTYPES[leaf.dtype]] for leaf in leaves if leaf.kind == "partial"]
    return max([NORM_ERROR if p in (1, 2, math.inf) else SUM_ERROR, *rounded])


# ------------------------------------------------------------------------------------------------------ pure functions


@for_all(trees(), st.sampled_from([2.0, 1.0, 3.0, math.inf]), st.sampled_from([0.0, 0.01, 1.0, 2.0]), st.booleans())
def test_any_tree_is_clipped_by_its_true_norm(leaves: list[Leaf], p: float, share: float, called: bool) -> None:
    truth = norm64(leaves, p)
    limit = truth * share
    layout = layout_of(leaves, called)
    grads = tree_of(leaves, [leaf.held(WORLD.rank) for leaf in leaves])
    clipped, norm = dc.clip_grad_norm(grads, limit, layout=layout, norm_type=p)
    assert norm.dtype == mx.float32
    assert relative(norm, truth) <= error(leaves, p)
    assert same_bits(norm)
    factor = min(1.0, limit / (truth + 1e-6))
    for i, (spec, held) in enumerate(zip(leaves, clipped["blocks"], strict=True)):
        if not spec.is_on(WORLD.rank):
            assert held == {}
            continue
        found, values, dtype = held[f"w{i}"], spec.completed(WORLD.rank) * factor, DTYPES[spec.dtype]
        assert found.dtype == (dtype if mx.issubdtype(dtype, mx.inexact) else mx.float32)
        added = error(leaves, p) + (len(RANKS) * EPSILON[found.dtype] if spec.kind == "partial" else 0)
        assert_close(found, values, rtol=2 * EPSILON[found.dtype] + added)


@for_all(
    trees(partial=False), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 9), st.integers(0, N - 1)
)
def test_a_bad_value_anywhere_makes_every_rank_zero(leaves: list[Leaf], bad: float, choice: int, rank: int) -> None:
    """A replica has it on all ranks, a block on each rank that holds the block."""
    floating = [i for i, leaf in enumerate(leaves) if leaf.dtype not in ("int32", "bool")]
    index = [-1, *floating][choice % (1 + len(floating))]
    held = [leaf.held(WORLD.rank) for leaf in leaves]
    spoiled = index >= 0 and leaves[index].held(rank).size > 0
    if spoiled and leaves[index].block(rank) == leaves[index].block(WORLD.rank):
        values = held[index].reshape(-1)
        values[values.size // 2] = bad
        held[index] = values.reshape(held[index].shape)
    grads, layout = tree_of(leaves, held), layout_of(leaves)
    clipped, norm = dc.clip_grad_norm(grads, 1.0, layout=layout, nonfinite="zero")
    assert same_bits(norm)
    assert mx.isfinite(norm).item() is not spoiled
    if spoiled:
        with pytest.raises(FloatingPointError):
            dc.clip_grad_norm(grads, 1.0, layout=layout, nonfinite="raise")
        assert not any(wide(leaf).any() for leaf in leaves_of(clipped))  # mx.any of an empty array may never end


@for_all(trees(partial=False), st.sampled_from([0.5, 2.0]))
def test_any_tree_of_partial_gradients_is_averaged_and_clipped(leaves: list[Leaf], share: float) -> None:
    """Each rank's own gradient; the average counts once."""
    leaves = [replace(leaf, kind="partial", axes=()) for leaf in leaves if leaf.dtype in REAL and not leaf.ranks]
    grads = {f"w{i}": leaf.held(WORLD.rank) for i, leaf in enumerate(leaves)}
    means = {f"w{i}": leaf.completed(WORLD.rank) / N for i, leaf in enumerate(leaves)}
    truth = math.sqrt(math.fsum(float((np.abs(mean) ** 2).sum()) for mean in means.values()))
    limit = truth * share
    clipped, norm = dc.average_and_clip(grads, limit)
    assert relative(norm, truth) <= error(leaves)
    assert same_bits(norm)
    assert same_bits(clipped)
    factor = min(1.0, limit / (truth + 1e-6))
    for name, mean in means.items():
        assert_close(clipped[name], mean * factor, error(leaves) + (2 + N) * EPSILON[clipped[name].dtype])


# ---------------------------------------------------------------------------------------------------------- whole runs

RULES: dict[str, Callable[[], Any]] = {
    "a number": lambda: 0.7,
    "a schedule": lambda: optim.linear_schedule(0.5, 1.5, 4),
    "AutoClip": lambda: dc.AutoClip(percentile=50, history=3),
    "ZClip": lambda: dc.ZClip(warm_up=2),
    "AdaGC": lambda: dc.AdaGC(warm_up=2),
}
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: optim.SGD(0.1),
    "momentum": lambda: optim.SGD(optim.cosine_decay(0.1, 6), momentum=0.9),
    "AdamW": lambda: optim.AdamW(1e-2, bias_correction=True),
}
SHAPES = {"a": (3, 4), "b": (5,)}


@dataclass(frozen=True)
class Given:
    """The gradients of a step: its seed, their size, and a bad value on one rank."""

    seed: int
    exponent: int
    bad: float | None
    rank: int

    def grads(self, rank: int) -> dict[str, mx.array]:
        at = 10.0**self.exponent
        grads = {k: normal(shape, (self.seed, rank, i), at=at) for i, (k, shape) in enumerate(SHAPES.items())}
        if self.bad is not None and rank == self.rank:
            grads["b"][0] = self.bad
        return grads


@dataclass(frozen=True)
class Run:
    rule: str
    optimizer: str
    nonfinite: str
    averaged: bool
    compiled: bool
    groups: bool

    def made(self) -> tuple[dict[str, mx.array], dc.ClippedOptimizer]:
        clipper = dc.Clipper(
            RULES[self.rule](),
            average=self.averaged,
            nonfinite=self.nonfinite,
            groups={"first": "a"} if self.groups else None,
            max_consecutive_skips=None,
            check="never",
        )
        optimizer = dc.ClippedOptimizer(OPTIMIZERS[self.optimizer](), clipper)
        rank = 0 if self.averaged else WORLD.rank
        parameters = {k: normal(shape, (99, rank, i)) for i, (k, shape) in enumerate(SHAPES.items())}
        optimizer.init(parameters)
        return parameters, optimizer

    def run(self, steps: list[Given], saved_at: int | None = None) -> tuple[dict[str, mx.array], dc.ClippedOptimizer]:
        """Train; at a step all goes through a file into new objects, and the run goes on with these."""
        parts, start = [steps], self.made()
        if saved_at is not None:
            parts = [steps[:saved_at], steps[saved_at:]]
        for i, part in enumerate(parts):
            if i > 0:
                start = self.restored(*start)
            self.train(*start, part)
        return start

    def train(self, parameters: dict[str, mx.array], optimizer: dc.ClippedOptimizer, steps: list[Given]) -> None:
        box = [parameters, optimizer.state]

        def step(grads: Any) -> None:
            box[0].update(optimizer.apply_gradients(grads, box[0]))

        run: Any = partial(mx.compile, inputs=box, outputs=box)(step) if self.compiled else step
        for step_ in steps:
            run(step_.grads(WORLD.rank))
            mx.eval(box)

    def restored(self, parameters: Any, optimizer: Any) -> tuple[Any, Any]:
        everything: Any = tree_flatten({"parameters": parameters, "optimizer": optimizer.state})
        with tempfile.TemporaryDirectory() as folder:
            mx.save_safetensors(f"{folder}/run.safetensors", dict(everything))
            loaded: Any = tree_unflatten(list(mx.load(f"{folder}/run.safetensors").items()))  # type: ignore[union-attr]
            mx.eval(loaded)
        _, fresh = self.made()
        fresh.state = loaded["optimizer"]
        return loaded["parameters"], fresh


runs = st.builds(
    Run,
    rule=st.sampled_from(sorted(RULES)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    nonfinite=st.sampled_from(["skip", "zero"]),
    averaged=st.booleans(),
    compiled=st.booleans(),
    groups=st.booleans(),
)
steps_of_a_run = st.lists(
    st.builds(
        Given,
        seed=st.integers(0, 1000),
        exponent=st.integers(-3, 3),
        bad=st.sampled_from([None, None, math.nan, math.inf]),
        rank=st.sampled_from(RANKS),
    ),
    max_size=7,
)


def bits_of(*trees: Any) -> list[tuple[str, bytes]]:
    flat: Any = tree_flatten(trees)
    return sorted((path, np.array(leaf).tobytes()) for path, leaf in flat)


@for_all(runs, steps_of_a_run, st.integers(0, 7))
def test_a_run_goes_on_from_any_step_to_the_same_bits(run: Run, steps: list[Given], saved_at: int) -> None:
    parameters, optimizer = run.run(steps)
    assert bits_of(*map(_plain, run.run(steps, saved_at))) == bits_of(parameters, optimizer.state)
    bad = [step.bad is not None for step in steps]
    state = {name: optimizer.clipper.state[name].item() for name in ("step", "bad", "in_a_row")}
    row = len(bad) - max((i + 1 for i, value in enumerate(bad) if not value), default=0)
    assert state == {"step": len(steps), "bad": sum(bad), "in_a_row": row}
    if run.nonfinite == "skip":  # as if it had never seen the bad steps
        clean, trained = run.run([step for step in steps if step.bad is None])
        assert bits_of(parameters, optimizer.state["optimizer"]) == bits_of(clean, trained.state["optimizer"])


def _plain(part: Any) -> Any:
    return part if isinstance(part, dict) else part.state


@for_all(steps_of_a_run, st.booleans(), st.booleans())
def test_a_run_by_hand_in_float64(steps: list[Given], averaged: bool, compiled: bool) -> None:
    run = Run("a number", "SGD", "skip", averaged, compiled, groups=False)

    found, _ = run.run(steps)
    expected = {k: wide(x) for k, x in run.made()[0].items()}
    for step in steps:
        if step.bad is not None:
            continue
        all_grads = [{k: wide(x) for k, x in step.grads(rank).items()} for rank in RANKS]
        means = {k: np.stack([grads[k] for grads in all_grads]).mean(axis=0) for k in SHAPES}
        mine, parts = (means, [means]) if averaged else (all_grads[WORLD.rank], all_grads)
        norm = math.sqrt(math.fsum(float(np.square(x).sum()) for part in parts for x in part.values()))
        expected = {k: x - 0.1 * min(1.0, 0.7 / (norm + 1e-6)) * mine[k] for k, x in expected.items()}
    for k, values in expected.items():
        assert_close(found[k], values, rtol=1e-5)
