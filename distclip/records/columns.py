"""The steps of a record as columns of numbers: a million steps fit, where a dict for each would not."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import numpy as np

from distclip.records.read import Records, scan

Numbers = np.ndarray[Any, np.dtype[Any]]


class Column:
    """The values of one name, and the places of their steps: a step may lack a value."""

    def __init__(self) -> None:
        self.places: Any = array("I")  # then a numpy array
        self.values: Any = array("d")

    def cut(self, count: int) -> None:
        first = bisect_left(self.places, count)
        del self.places[first:], self.values[first:]

    def filled(self, count: int, value: float) -> Numbers:
        """A value for each of ``count`` steps, with ``value`` where a step has none."""
        filled = np.full(count, float(value))
        filled[self.places] = self.values
        return filled


class Columns:
    """A record for the report.

    Attributes:
        steps (numpy.ndarray): int64, shape (steps,), rising.
        numbers (dict): a column for each name.
        tables (dict): the columns by group or rank, for each of ``groups``, ``rank_norms``, ``threshold``, ``scale``.
        records (Records): the rest of the file: ``steps`` is empty.
    """

    def __init__(self) -> None:
        self.steps: Any = array("q")
        self.numbers: dict[str, Column] = {}
        self.tables: dict[str, dict[Any, Column]] = {}
        self.records = Records()

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: dict[str, Any]) -> None:
        place = len(self.steps)
        self.steps.append(step.pop("step"))
        for name, value in step.items():
            if type(value) is dict:
                _add(self.tables.setdefault(name, {}), place, value.items())
            elif type(value) is list:
                _add(self.tables.setdefault(name, {}), place, enumerate(value))
            else:
                _add(self.numbers, place, ((name, value),))

    def cut(self, first: int) -> None:
        """Forget the steps from ``first`` on: the run was resumed there."""
        count = len(self.steps)
        while count and self.steps[count - 1] >= first:
            count -= 1
        del self.steps[count:]
        for column in self._columns():
            column.cut(count)

    def get(self, name: str, value: float) -> Numbers:
        """The column of a name, with ``value`` where a step has none."""
        return self.numbers.get(name, Column()).filled(len(self), value)

    def finish(self) -> None:
        """Make numpy arrays of the columns, with the steps in order, and of equal steps the last."""
        self.steps = np.frombuffer(self.steps, np.int64)
        for column in self._columns():
            column.places = np.frombuffer(column.places, np.uint32)
            column.values = np.frombuffer(column.values, np.float64)
        if np.all(self.steps[1:] > self.steps[:-1]):
            return
        order = np.argsort(self.steps, kind="stable")
        order = order[np.append(self.steps[order][1:] > self.steps[order][:-1], True)]
        places = np.full(len(self.steps), -1)
        places[order] = np.arange(len(order))
        self.steps = self.steps[order]
        for column in self._columns():
            moved = places[column.places]
            order = np.argsort(moved, kind="stable")[np.count_nonzero(moved < 0) :]
            column.places, column.values = moved[order], column.values[order]

    def _columns(self) -> list[Column]:
        return [*self.numbers.values(), *(column for table in self.tables.values() for column in table.values())]


def read_columns(path: str | os.PathLike[str]) -> Columns:
    """Read a record as :func:`distclip.read_records` does, and raise as it does."""
    columns = Columns()
    for resumed, step in scan(path, columns.records):
        if resumed:
            columns.cut(step["step"])
        columns.add(step)
    columns.finish()
    return columns


def _add(table: dict[Any, Column], place: int, row: Iterable[tuple[Any, float]]) -> None:
    for key, value in row:
        column = table.get(key) or table.setdefault(key, Column())
        column.places.append(place)
        column.values.append(value)
