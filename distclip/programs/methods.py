"""The methods of MLX's optimizers, replaced so that each step is made by somebody else first."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import mlx.core as mx
from mlx.optimizers import Optimizer

from distclip.optimizer import ClippedOptimizer
from distclip.programs.patches import Function, Patches
from distclip.tree import flatten_beside

_thread = threading.local()  # whether it is in a step


class Steps(Protocol):
    """What makes the steps."""

    is_open: bool  # else a method that a program has kept works as it did

    def step(self, optimizer: Any, update: Function, gradients: Any, parameters: Any) -> Any: ...
    def leave_to_program(self) -> None: ...
    def evaluated(self, values: Any) -> None: ...


def replace_methods(steps: Steps, patches: Patches) -> None:
    """Have ``steps`` make the steps of all optimizers, those of later subclasses too; of nested ones, the outermost.

    Each method that a class defines itself is replaced: ``apply_gradients``, and ``update`` where a subclass has its
    own. The steps of a :class:`distclip.ClippedOptimizer` are its own. ``steps`` is told what ``mx.eval`` evaluated.
    """

    def patch(cls: type) -> None:
        for name, make in (("apply_gradients", _clipping_gradients), ("update", _clipping_update)):
            if name in vars(cls) and not (cls is Optimizer and name == "update"):  # which calls the other
                patches.method(cls, name, functools.partial(make, steps))

    def init_subclass(cls: Any, /, **options: Any) -> None:
        super(Optimizer, cls).__init_subclass__(**options)
        patch(cls)

    for cls in _with_subclasses(Optimizer):
        patch(cls)
    patches.attribute(Optimizer, "__init_subclass__", classmethod(init_subclass))
    patches.method(ClippedOptimizer, "apply_gradients", functools.partial(_leaving_to_program, steps))
    patches.functions([(mx.eval, _telling(steps, mx.eval))])


def _with_subclasses(cls: type) -> list[type]:
    found = [cls]
    subclasses: list[type] = type.__subclasses__(cls)
    for subclass in subclasses:
        found += [new for new in _with_subclasses(subclass) if new not in found]
    return found


def is_inside() -> bool:
    """Whether this thread makes a step."""
    return bool(getattr(_thread, "inside", False))


@contextlib.contextmanager
def _inside() -> Iterator[None]:
    _thread.inside = True
    try:
        yield
    finally:
        _thread.inside = False


def _clipping_gradients(steps: Steps, original: Function) -> Function:
    @functools.wraps(original)
    def apply_gradients(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not steps.is_open or is_inside():
            return original(optimizer, *args, **kwargs)
        (gradients, parameters, *rest), kwargs = _in_order(original, optimizer, args, kwargs)

        def update(gradients: Any, parameters: Any) -> Any:
            return original(optimizer, gradients, parameters, *rest, **kwargs)

        with _inside():
            return steps.step(optimizer, update, gradients, parameters)

    return apply_gradients


def _clipping_update(steps: Steps, original: Function) -> Function:
    @functools.wraps(original)
    def update(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not steps.is_open or is_inside():
            return original(optimizer, *args, **kwargs)
        (model, gradients, *rest), kwargs = _in_order(original, optimizer, args, kwargs)
        before, returned = None, None

        def in_place(gradients: Any, model: Any) -> Any:
            nonlocal before, returned
            if before is None:
                leaves, values = flatten_beside(gradients, model)
                before = leaves.rebuild([value.__copy__() for value in values])
            else:  # a first call could not be undone in mx.compile, and this one makes the same step
                model.update(before)
            returned = original(optimizer, model, gradients, *rest, **kwargs)
            leaves, values = flatten_beside(gradients, model)
            return leaves.rebuild(values)

        with _inside():
            model.update(steps.step(optimizer, in_place, gradients, model))
        return returned

    return update


def _in_order(original: Function, optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """The arguments of a call by their places."""
    if len(args) >= 2:
        return args, kwargs
    bound = inspect.signature(original).bind(optimizer, *args, **kwargs)
    return bound.args[1:], bound.kwargs


def _leaving_to_program(steps: Steps, original: Function) -> Function:
    @functools.wraps(original)
    def apply_gradients(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not steps.is_open or is_inside():
            return original(optimizer, *args, **kwargs)
        steps.leave_to_program()
        with _inside():
            return original(optimizer, *args, **kwargs)

    return apply_gradients


def _telling(steps: Steps, original: Function) -> Function:
    @functools.wraps(original)
    def evaluate(*args: Any) -> None:
        original(*args)
        if steps.is_open and not is_inside():
            steps.evaluated(args)

    return evaluate
