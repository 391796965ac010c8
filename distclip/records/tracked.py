"""What the user names as a tracker, made a sink; the numbers of a step by the names that trackers show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from distclip.records.trackers import TRACKERS, Tracker

NAMES = {"norm": "grad_norm", "groups": "grad_norm", "rank_norms": "rank_norm"}  # others keep those of the record
NO_NUMBERS = ("kind", "step", "time", "rank_hosts")


def trackers_of(sinks: Any) -> list[Tracker]:
    """The trackers that the user names.

    Raises:
        TypeError, ValueError: one is none.
    """
    if isinstance(sinks, (str, Mapping)) or not hasattr(sinks, "__iter__"):
        sinks = [sinks]
    return [_tracker_of(sink) for sink in sinks]


def _tracker_of(sink: Any) -> Tracker:
    if isinstance(sink, str):
        if sink not in TRACKERS:
            raise ValueError(f"{sink!r} is no tracker: choose from {', '.join(map(repr, TRACKERS))}")
        sink = TRACKERS[sink]
    if isinstance(sink, type):
        sink = sink()
    if all(callable(getattr(sink, method, None)) for method in ("start", "log", "finish")):
        return sink  # type: ignore[no-any-return]
    if callable(sink):
        return _Function(sink)
    raise TypeError(
        f"A sink is the name of a tracker ({', '.join(map(repr, TRACKERS))}), a function of (numbers, step), or an "
        f"object with start, log and finish, not {sink!r}"
    )


class Tracked:
    """A tracker as :class:`distclip.records.background.Background` uses it.

    Raises:
        ImportError: the package that it needs is not installed, or broken.
    """

    wait_s = 0.0  # a step never waits for a tracker

    def __init__(self, tracker: Tracker, config: dict[str, Any]):
        name = getattr(tracker, "name", None) or getattr(tracker, "__name__", type(tracker).__name__)
        self.name, self.lost = f"the tracker {name}", 0
        self._tracker, self._config, self._state, self._last = tracker, config, "new", 0
        self._find_run = getattr(tracker, "find_run", None)
        if package := getattr(tracker, "package", None):
            _import(package)

    def find_run(self) -> None:
        """Look for a run of the program, once. Called in the thread that trains: mlflow keeps one for each thread."""
        if self._find_run is not None:
            find, self._find_run = self._find_run, None
            try:
                find()
            except Exception:  # of a package that differs from those tested
                return

    def begin(self) -> None:
        """Nothing: it starts with the first step."""

    def write(self, record: dict[str, Any]) -> None:
        if self._state == "new":
            self._state = "broken"
            self._tracker.start(self._config)
            self._state, self._last = "started", record["step"]
        if record["step"] < self._last:
            raise ValueError(f"step {record['step']} came after step {self._last}, and trackers take rising steps")
        if self._state == "started":
            self._last = record["step"]
            self._tracker.log(numbers_of(record), self._last)

    def flush(self) -> None:
        if self._state == "started" and hasattr(self._tracker, "flush"):
            self._tracker.flush()

    def close(self, status: str) -> None:
        if self._state == "started":
            self._tracker.finish(status)


def _import(package: str) -> None:
    name = package.partition(".")[0]
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name:
            raise ImportError(f"The package {name} is installed and cannot be imported: {error}") from error
        raise ImportError(f"The tracker {name} needs the package {name}: pip install {name}") from error


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step by the names that trackers show.

    >>> numbers_of({"step": 3, "norm": 5.0, "clipped": True, "groups": {"mlp": 4.0}, "rank_norms": [5.0, 6.0]})
    {'grad_norm': 5.0, 'clipped': 1.0, 'grad_norm/mlp': 4.0, 'rank_norm/0': 5.0, 'rank_norm/1': 6.0}
    """
    return {name: float(value) for name, value in _flat(record) if isinstance(value, (bool, int, float))}


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        name = NAMES.get(key, key)
        if isinstance(value, list):
            value = dict(enumerate(value))
        if key in NO_NUMBERS:
            continue
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in value.items())
        else:
            yield name, value


class _Function:
    """A function of the user, which takes numbers and step."""

    def __init__(self, function: Callable[[dict[str, float], int], Any]):
        self.name, self.log = getattr(function, "__name__", repr(function)), function

    def start(self, config: dict[str, Any]) -> None:
        """Nothing."""

    def finish(self, status: str) -> None:
        """Nothing."""
