"""Numbers that users pass: of Python, NumPy or another library, as Python's own, and one sentence for what is none."""

from __future__ import annotations

import numbers
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
        raise TypeError(f"{name} is {value!r}; pass a number")
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


def whole(name: str, value: Any, least: int) -> int:
    """A whole number as Python's own.

    Raises:
        TypeError: it is none.
        ValueError: it is below the least.
    """
    plain = number(name, value)
    if plain != plain or plain in (float("inf"), float("-inf")) or plain != int(plain):
        raise TypeError(f"{name} is {value!r}; pass a whole number")
    check(plain >= least, f"{name} should be at least {least}", value)
    return int(plain)
