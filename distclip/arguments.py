"""What users pass: numbers of any library as Python's own, and one sentence for what is not what it should be."""

from __future__ import annotations

import inspect
import numbers
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx


def check(condition: bool, text: str, value: object) -> None:
    """Raise ValueError with a text that says what a value should be, unless the condition holds."""
    if not condition:
        raise ValueError(f"{text}, {value} was provided instead")


def number(name: str, value: Any) -> float:
    """A number as Python's own. In arithmetic with NumPy's, NumPy takes over and evaluates the arrays of MLX.

    Raises:
        TypeError: it is no number. An array of MLX is none, since its value is not looked at.
    """
    if type(value) in (int, float):
        return value  # type: ignore[no-any-return]
    plain = value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
    if isinstance(value, mx.array) or not isinstance(plain, numbers.Real):
        raise TypeError(f"{name} is {shown(value)}; pass a number")
    return float(plain)


def scalar(name: str, value: Any) -> float | mx.array:
    """As :func:`number`; an array of MLX is returned as it is, and its value is not looked at.

    Raises:
        TypeError: it is no number, and no array of one value.
    """
    if not isinstance(value, mx.array):
        return number(name, value)
    if value.size != 1:
        raise TypeError(f"{name} is an array of shape {value.shape}; pass a number or an array of one value")
    return value


def make_plain(rule: Any, *names: str) -> None:
    """Make fields of a frozen rule Python's own numbers."""
    for name in names:
        object.__setattr__(rule, name, number(name, getattr(rule, name)))


def whole(name: str, value: Any, least: int) -> int:
    """A whole number as Python's own.

    Raises:
        TypeError: it is none.
        ValueError: it is below the least.
    """
    plain = number(name, value)
    if plain != plain or plain in (float("inf"), float("-inf")) or plain != int(plain):
        raise TypeError(f"{name} is {shown(value)}; pass a whole number")
    check(plain >= least, f"{name} should be at least {least}", value)
    return int(plain)


def shown(value: Any) -> str:
    """A wrong argument, for a message: a tree or a model by its kind, since its values would fill pages."""
    if hasattr(value, "trainable_parameters"):
        return "a model"
    if isinstance(value, (dict, mx.array)):
        return "a dictionary" if isinstance(value, dict) else f"an array of shape {value.shape}"
    text = repr(value)
    return text if len(text) < 200 else f"a {type(value).__name__}"


def described(thing: object, **options: Any) -> str:
    """An object and what it was made with, for its ``repr``; what is None is left out. No array is evaluated."""
    shown = (f"{name}={brief(value)}" for name, value in options.items() if value is not None)
    return f"{type(thing).__name__}({', '.join(shown)})"


def brief(value: Any) -> str:
    """A short ``repr``. No array is evaluated."""
    if isinstance(value, mx.array):
        return f"array({str(value.dtype).rpartition('.')[2]}, shape={value.shape})"
    if isinstance(value, mx.distributed.Group):
        return f"<group of {value.size()} ranks>"
    if inspect.isroutine(value):
        return value.__qualname__.replace(".<locals>", "")
    text = "" if isinstance(value, (dict, list, tuple)) else repr(value)
    return text if 0 < len(text) < 120 else f"<{type(value).__name__}>"


def described_rule(rule: Any) -> str:
    """A rule that is a dataclass, as :func:`described`."""
    return described(rule, **{field.name: getattr(rule, field.name) for field in fields(rule)})


def check_gradients(grads: Any) -> None:
    """Raise if a model or a function is passed where gradients should be, and warn if a loss is passed with them.

    Raises:
        TypeError: it is a model or a function.
    """
    wrong = "model" if hasattr(grads, "trainable_parameters") else "function" if callable(grads) else None
    if wrong is not None:
        raise TypeError(
            f"A {wrong} is passed where the gradients should be: pass the second of the results of "
            "nn.value_and_grad(model, loss_fn)(...)."
        )
    if type(grads) is tuple and len(grads) == 2 and isinstance(grads[1], dict) and _is_loss(grads[0]):
        # No error: parameters may be a pair of a scalar and a tree.
        warnings.warn(
            "The gradients are a pair of a number and a dictionary, as value_and_grad returns them with the loss. Take "
            "the second: loss, grads = value_and_grad(...).",
            RuntimeWarning,
            stacklevel=callers_level(),
        )


def check_model(model: Any) -> None:
    """Raise TypeError unless it is a model."""
    if not hasattr(model, "parameters") or isinstance(model, type):
        raise TypeError(f"model is {shown(model)}; pass an nn.Module")


def _is_loss(value: Any) -> bool:
    """Whether it is an array of no dimensions, or a tuple of those, as a loss with counts is."""
    values = value if isinstance(value, tuple) and value else (value,)
    return all(isinstance(x, mx.array) and x.ndim == 0 for x in values)


def callers_level() -> int:
    """The stack level of the first caller outside distclip, as its own caller counts them."""
    here, level = str(Path(__file__).parent), 0
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        frame, level = frame.f_back, level + 1
    return level + 1
