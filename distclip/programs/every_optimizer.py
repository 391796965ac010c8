"""Clip in every optimizer that a program makes, whatever the program is: MLX's own methods are replaced for a while."""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import os
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import mlx.core as mx
import mlx.nn as nn

from distclip.check import differing_replicas
from distclip.clipper import Clipper
from distclip.engine import kernels
from distclip.engine.streams import is_tracing
from distclip.layout import LayoutError, Replicated
from distclip.optimizer import CannotUndo
from distclip.programs.calls import Calls, listen, value_clip
from distclip.programs.methods import is_inside, replace_methods
from distclip.programs.patches import Patches
from distclip.programs.watch import Reporting, Watch, say, totals
from distclip.report import Report
from distclip.snapshot import Snapshot
from distclip.world import all_gather, communicates_here, init

KEY = "distclip"  # of the clipper's state in the optimizer's
NEW = "new"  # in that state: an array whose number of dimensions is new, so that compiled functions are traced again
LOOKED_AT = 200  # containers, to know whether mx.eval was given an optimizer's state
MOST_NAMED = 3

_active: Clipping | None = None
_dimensions = itertools.count(1)
_compiled: WeakSet[Any] = WeakSet()  # optimizers whose step was traced in a context that has ended


@contextlib.contextmanager
def clipped_optimizers(
    max_norm: Any = 1.0, *, on_step: Callable[[Report], Any] | None = None, **options: Any
) -> Iterator[Clipping]:
    """Clip and guard each step of every optimizer of ``mlx.optimizers`` that is made or used in this context.

    It replaces methods of :class:`mlx.optimizers.Optimizer` and of its subclasses, those that are made later too, so
    names that a program has imported, ``isinstance`` and compiled steps go on working; a compiled step that has run
    before is not clipped. Of nested optimizers the outermost clips (``MultiOptimizer``). A skipped step is undone as by
    :class:`distclip.ClippedOptimizer`. The clipper's state is in the optimizer's, as ``optimizer.state["distclip"]``,
    until the context ends: a checkpoint carries it, and one without it loads. (After compiled steps an array of one
    number stays.) An optimizer that a :class:`distclip.ClippedOptimizer` wraps is left to it.

        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> model, optimizer = nn.Linear(2, 1, bias=False), optim.SGD(1.0)
        >>> with clipped_optimizers(max_norm=1.0) as clipping:
        ...     optimizer.update(model, {"weight": mx.array([[3.0, 4.0]])})
        distclip: 1 steps, 100% clipped, 0 skipped, last norm 5
        >>> clipping.norm
        5.0

    **Several ranks.** Gradients count as replicas, unless ``layout`` or ``average`` is given. In the first eager step
    after ``average_gradients`` of all ranks they compare them. Elsewhere calls that average are looked for: in
    ``mx.compile`` nothing can be compared, and where a program communicates otherwise not every rank may make a step.
    At the end of the context parameters are compared. Rank 0 prints what is wrong; nothing is stopped. An exception
    leaves the context without a word to the other ranks; uncaught it ends the job.

    Each step evaluates the numbers of the step before. In a compiled step they are read after ``mx.eval`` of the
    optimizer's state.

    Args:
        max_norm: as for :class:`distclip.Clipper`, but 0 clips nothing: norms are still measured, bad steps skipped.
        on_step: called with the :class:`distclip.Report` of each step, one step later, such as a
            :class:`distclip.Recorder`.
        **options: of :class:`distclip.Clipper`. With ``average=True`` gradients are averaged over the ranks first.

    Yields:
        Clipping: with ``steps``, ``clipped``, ``skipped`` and ``norm`` (the last) of all optimizers together.

    Raises:
        ValueError: the context is entered again with other options.
        FloatingPointError: in a step, as :class:`distclip.ClippedOptimizer`.
    """
    global _active
    if _active is not None:
        _active.check_same(max_norm, on_step, options)
        yield _active
        return
    clipping = Clipping(max_norm, on_step, options)
    patches = Patches()
    try:
        replace_methods(clipping, patches)
        listen(clipping.calls, patches, lambda: not is_inside())
        _active = clipping
        yield clipping
        clipping.finish()
    except BaseException as error:
        if os.getpid() != clipping.process:  # a forked child that ends is no rank, and MLX may hang there
            raise
        if isinstance(error, SystemExit) and not error.code:
            clipping.finish()
        elif clipping.steps:
            clipping.say_totals()
        raise
    finally:
        _active, clipping.is_open = None, False
        patches.undo()
        clipping.leave()


def off_at_zero(max_norm: Any) -> Any:
    """A threshold of 0 clips nothing, as in other trainers."""
    return math.inf if isinstance(max_norm, numbers.Real) and max_norm == 0 else max_norm


def _clips_nothing(max_norm: Any) -> bool:
    return isinstance(max_norm, numbers.Real) and max_norm == math.inf


class Clipping:
    """What :func:`clipped_optimizers` does, for all optimizers together.

    Attributes:
        steps, clipped, skipped (int): counts of the steps that were read.
        norm (float): of the last one.
    """

    def __init__(self, max_norm: Any, on_step: Callable[[Report], Any] | None, options: dict[str, Any]):
        self._given = {"max_norm": max_norm, "on_step": on_step} | options
        self._placed = options.get("layout") is not None or bool(options.get("average"))
        self._options = options if self._placed else {"check": "never"} | options | {"layout": Replicated()}
        self._max_norm, self._on_step = off_at_zero(max_norm), on_step
        self._averages = bool(options.get("average"))
        self._clipper()  # refuses wrong options
        kernels.engine(options.get("stream"))  # on a GPU proves that the kernels work: a compiled step cannot
        self.calls = Calls()
        self._several, self._talks = init().size > 1, communicates_here()
        self._compares = self._several and self._talks and not self._placed  # parameters, at the end
        self.is_open, self.process = True, os.getpid()
        self._watches: WeakKeyDictionary[Any, Watch] = WeakKeyDictionary()  # by optimizer
        self._every: list[Watch] = []
        self._said: set[str] = set()
        self._heard, self._stepped, self._compared, self._averaged, self._own = False, False, False, False, False
        self._traced: WeakSet[Any] = WeakSet()  # optimizers
        for optimizer in _compiled:
            _home(optimizer)[KEY] = _to_trace_again()
        self._trained: Any = {}  # what is compared: the model of the last step, or else the optimizer's state

    @property
    def steps(self) -> int:
        return sum(watch.step for watch in self._every)

    @property
    def clipped(self) -> int:
        return sum(watch.clipped for watch in self._every)

    @property
    def skipped(self) -> int:
        return sum(watch.bad for watch in self._every)

    @property
    def norm(self) -> float:
        return self._every[-1].norm if self._every else 0.0

    def _clipper(self) -> Clipper:
        return Clipper(self._max_norm, **self._options)

    def check_same(self, max_norm: Any, on_step: Any, options: dict[str, Any]) -> None:
        given = {"max_norm": max_norm, "on_step": on_step} | options
        if given.keys() != self._given.keys() or any(not _is_same(given[name], self._given[name]) for name in given):
            raise ValueError(
                f"Optimizers are clipped already, with {_in_words(self._given)}: leave that context first, or give the "
                f"same options, not {_in_words(given)}."
            )

    def step(self, optimizer: Any, update: Callable[[Any, Any], Any], gradients: Any, parameters: Any) -> Any:
        """Make a step of an optimizer by its own method, clipped. Returns what the method returns."""
        traced = is_tracing()
        if not traced:
            self.read()
        home = _home(optimizer)
        watch = self._watch(optimizer, home)
        if traced:
            self._traced.add(optimizer)
        self._hear(gradients, traced)
        if self._compares:
            self._trained = parameters if isinstance(parameters, nn.Module) else home
        home.pop(KEY, None)
        try:
            original = _Original(optimizer, update)
            return _clipped(original, watch.clipper, gradients, parameters, self._say_once)
        finally:
            _home(optimizer)[KEY] = watch.clipper.state  # the optimizer may have replaced its state
            self.calls.forget()

    def read(self) -> None:
        for watch in self._every:
            watch.read()

    def evaluated(self, values: Any) -> None:
        """Read the last steps, if the state of an optimizer is in these containers, which were evaluated."""
        if any(_is_in(_home(optimizer), values) for optimizer in self._watches):
            self.read()

    def finish(self) -> None:
        """Read the last steps, compare the ranks' parameters, and say how it went. Collective."""
        self.read()
        if self._compares:
            self._compare()
        self.say_totals()

    def say_totals(self) -> None:
        if self._every:
            nonfinite = self._every[-1].clipper.nonfinite
            say(f"{self.steps} steps, {totals(self.steps, self.clipped, self.skipped, self.norm, nonfinite)}")
        elif not self._own:
            say("no optimizer of mlx.optimizers made a step here, so nothing was clipped")

    def leave(self) -> None:
        """Take the clippers' states out of the optimizers'. A compiled step must not be taken for the first one of this
        context, which was traced without them and returns them: MLX would put them where other arrays are."""
        for optimizer in self._watches:
            _home(optimizer).pop(KEY, None)
        for optimizer in self._traced:
            _home(optimizer)[KEY] = _to_trace_again()
        _compiled.update(self._traced)
        self._trained = {}

    def leave_to_program(self) -> None:
        self._own = True
        self._say_once("this program clips with a dc.ClippedOptimizer of its own, and its steps are left to that")

    def _watch(self, optimizer: Any, home: dict[str, Any]) -> Watch:
        """The watch of an optimizer; a new one where it has none, or where its state was restored."""
        watch, held = self._watches.get(optimizer), home.get(KEY)
        if watch is None or held is not watch.clipper.state:
            clipper = self._clipper()
            if isinstance(held, dict) and held.keys() != {NEW}:
                clipper.state = held
            if optimizer in _compiled:
                clipper.state |= _to_trace_again()
            if watch is not None:
                self._every.remove(watch)
            watch = self._watches[optimizer] = Watch(clipper, self._on_step)
            self._every.append(watch)
        return watch

    def _hear(self, gradients: Any, traced: bool) -> None:
        """Say what the program does itself, or forgets to do, before this step."""
        if not _clips_nothing(self._max_norm):
            by_value = value_clip() if not self._heard else None
            for name in [*sorted(self.calls.clips), *filter(None, [by_value])]:
                self._say_once(_TWICE.format(name))
        self._heard = True
        if not self._several or (self._placed and not self._averages):
            return
        averages = self.calls.averages(traced=traced)
        self._averaged |= averages
        if self._averages:
            if averages:
                self._say_once("the program averages its gradients itself: averaging them again is not needed")
        elif traced:
            if not averages:
                self._say_once(_APART.format("The compiled step averages", init().size))
        elif not self._compared and self._talks and communicates_here():
            if self.calls.averages_all:
                self._compared = True
                if error := differing_replicas(gradients, what="gradients", drift=False):
                    self._say_once(_DIFFERENT.format("the gradients of the first step", _leaves(error)))
            elif not (self._stepped or self.calls.communicates):
                self._say_once(_APART.format("The first step averages", init().size))
            self._stepped = True

    def _compare(self) -> None:
        trained = self._trained
        tree = trained.trainable_parameters() if isinstance(trained, nn.Module) else dict(trained)
        tree.pop(KEY, None)
        # Copies may drift apart on different machines; the ranks ask the same question.
        facts: Any = all_gather(mx.array([[self._averaged, bool(self._every)]]), init().group).tolist()
        averaged, stepped = zip(*facts, strict=True)
        if not all(stepped):  # some ranks train for all
            return
        what = "parameters" if isinstance(trained, nn.Module) else "states of the optimizers"
        if error := differing_replicas(tree, what=what, drift=not all(averaged)):
            text = _BEGAN_APART if all(averaged) else _DIFFERENT
            self._say_once(text.format(f"at the end the {what}", _leaves(error)))

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            say(what)


_REMEDY = "If ranks take different batches, average them: --average, or average=True"
_APART = "{} no gradients over the {} ranks, so each rank trains a model of its own. " + _REMEDY + "."
_DIFFERENT = "{} differ between ranks, in {}. " + _REMEDY + "; if they hold shards, pass layout= to clipped_optimizers."
_BEGAN_APART = (
    "{} differ between ranks, in {}, though the program averages. If all ranks train one model, seed them alike before "
    "they make it (mx.random.seed); if they hold shards, pass layout= to clipped_optimizers."
)
_TWICE = (
    "the program clips its gradients itself with {}, so they are clipped twice, and norms here are those after it. "
    "With --max-norm 0 (max_norm=0) the program alone clips, and bad steps are still skipped."
)


def _clipped(
    optimizer: _Original, clipper: Clipper, gradients: Any, parameters: Any, explain: Callable[[str], None]
) -> Any:
    """The updated parameters of a clipped step. Where a skip cannot be undone, bad gradients become zeros."""
    before = Snapshot(clipper.state) if is_tracing() else None  # outside of mx.compile all can be undone
    try:
        return Reporting(optimizer, clipper).apply_gradients(gradients, parameters)
    except BaseException as error:
        if before is not None:
            before.put_back(clipper.state)  # else it has no values where the program goes on
        if not isinstance(error, CannotUndo):
            raise
        clipper.nonfinite = "zero"
        what = f"a skipped step of {optimizer.name} cannot be undone in mx.compile, since it {error.obstacle}"
        explain(f"{what} in its state: bad gradients become zeros there instead")
        return Reporting(optimizer, clipper).apply_gradients(gradients, parameters)


class _Original:
    """An optimizer as it is without distclip, for a ClippedOptimizer."""

    def __init__(self, optimizer: Any, update: Callable[[Any, Any], Any]):
        self._optimizer, self.apply_gradients, self.name = optimizer, update, type(optimizer).__name__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def _home(optimizer: Any) -> dict[str, Any]:
    """The dictionary that lasts in an optimizer's state: a MultiOptimizer makes its own anew."""
    while getattr(optimizer, "optimizers", None):
        optimizer = optimizer.optimizers[0]
    state: dict[str, Any] = optimizer.state
    return state


def _to_trace_again() -> dict[str, mx.array]:
    """What no function was traced with, even where it was compiled for any shapes."""
    return {NEW: mx.zeros((1,) * next(_dimensions))}


def _is_in(home: dict[str, Any], values: Any) -> bool:
    """Whether a dictionary is among containers, by its identity. Not all that are in a large model are looked at."""
    level, left = [values], LOOKED_AT
    while level and left > 0:
        if any(node is home for node in level):
            return True
        left -= len(level)
        children = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in children if isinstance(child, (dict, list, tuple))]
    return False


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))


def _in_words(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)


def _leaves(error: LayoutError) -> str:
    """Some of the leaves that an error is about."""
    paths = [leaf.path for leaf in error.leaves]
    more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
    return ", ".join(f"'{path}'" for path in paths[:MOST_NAMED]) + more
