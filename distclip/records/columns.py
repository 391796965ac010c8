"""The steps of a record as columns of numbers: a million steps fit, where a dict for each would not."""

from __future__ import annotations

import os
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distclip.records.read import NAMES, Records, scan

MOST_NAMES, MOST_KEYS = 64, 4096  # of numbers in a record, and of groups or ranks of one of them; others are counted
Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Column:
    """The values of one name, and the places of their steps: a step may lack a value."""

    places: Any = field(default_factory=lambda: array("I"))  # then a numpy array
    values: Any = field(default_factory=lambda: array("d"))


@dataclass
class Columns:
    """A record for the report: a column for each name, and in ``tables`` for each group or rank of a name."""

    steps: Any = field(default_factory=lambda: array("q"))  # then int64, shape (steps,), rising
    numbers: dict[str, Column] = field(default_factory=dict)
    tables: dict[str, dict[Any, Column]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Column)))
    records: Records = field(default_factory=Records)  # the rest of the file: its steps are empty
    left_out: int = 0  # numbers under more names than are kept

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: dict[str, Any]) -> None:
        place = len(self.steps)
        self.steps.append(step.pop("step"))
        for name, value in step.items():
            if len(self.tables) >= MOST_NAMES and name not in self.tables and name not in NAMES:
                self.left_out += 1
                continue
            table = self.tables[name]
            rows: Any = ((None, value),)
            if type(value) in (dict, list):
                rows = value.items() if type(value) is dict else enumerate(value)
            for key, number in rows:
                if len(table) >= MOST_KEYS and key not in table:
                    self.left_out += 1
                    continue
                column = table[key]
                column.places.append(place)
                column.values.append(number)

    def get(self, name: str, value: float) -> Numbers:
        """The values of a name, with ``value`` where a step has none."""
        filled = np.full(len(self), float(value))
        if name in self.numbers:
            filled[self.numbers[name].places] = self.numbers[name].values
        return filled

    def finish(self, resumed: list[int]) -> None:
        """Make numpy arrays of the columns, with the steps in order, and of equal steps the last.

        A run that was resumed, at the places given, replaces what it runs again.
        """
        steps = np.frombuffer(self.steps, np.int64)
        kept = _kept(steps, resumed)
        self.steps, last = np.unique(steps[kept][::-1], return_index=True)
        places = np.full(len(steps), -1, np.int32)
        places[kept[::-1][last]] = np.arange(len(last))
        for column in (column for table in self.tables.values() for column in table.values()):
            moved, values = places[np.frombuffer(column.places, np.uint32)], np.frombuffer(column.values)
            order = np.argsort(moved, kind="stable")[np.count_nonzero(moved < 0) :]
            column.places, column.values = moved[order], values[order]
        self.numbers = {name: table.pop(None) for name, table in self.tables.items() if None in table}


def _kept(steps: Numbers, resumed: list[int]) -> Numbers:
    """The places of the steps that no resumed run runs again, in time linear in the steps."""
    kept, end, begin = np.empty(len(steps), np.int64), 0, 0
    for place in [*resumed, len(steps)]:
        kept[end : end + place - begin] = np.arange(begin, place)
        end, begin = end + place - begin, place
        lower, width = np.empty(0, np.int64), 64
        while place < len(steps) and end and not len(lower):
            lower = np.flatnonzero(steps[kept[max(end - width, 0) : end]] < steps[place])
            end = max(end - width, 0) + (lower[-1] + 1 if len(lower) else 0)
            width *= 2
    return kept[:end]


def read_columns(path: str | os.PathLike[str]) -> Columns:
    """Read a record as :func:`distclip.read_records` does, and raise as it does."""
    columns, resumed = Columns(), []
    for resumes, step in scan(path, columns.records):
        if resumes:
            resumed.append(len(columns))
        columns.add(step)
    columns.finish(resumed)
    return columns
