"""Replace functions and methods that are in use for a while, whoever imported them, and put them back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

Function = Callable[..., Any]


class Patches:
    """What was replaced. :meth:`undo` puts it back, the last first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def method(self, cls: type, name: str, make: Callable[[Function], Function]) -> None:
        """Replace a method that the class itself defines, by what ``make`` makes of it."""
        original = vars(cls)[name]
        setattr(cls, name, make(original))
        self._undo.append(lambda: setattr(cls, name, original))

    def attribute(self, cls: type, name: str, value: Any) -> None:
        """Give a class an attribute that it does not define itself."""
        setattr(cls, name, value)
        self._undo.append(lambda: delattr(cls, name))

    def functions(self, replacements: list[tuple[Function, Function]]) -> None:
        """Replace functions, each by the one beside it, in every module that has imported them."""
        _replace(replacements)
        back = [(new, old) for old, new in replacements]
        self._undo.append(lambda: _replace(back))

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


def _replace(replacements: list[tuple[Function, Function]]) -> None:
    by_identity = {id(old): new for old, new in replacements}
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            names = vars(module)
            for name, value in list(names.items()):
                if id(value) in by_identity:
                    names[name] = by_identity[id(value)]
