"""The ranks of a job as the launcher sees them, by their marks; and why a job failed."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from distclip.guard import listed

PEER_LOST = 14  # the exit code of a rank whose MPI has lost another


@dataclass
class Ranks:
    """What the ranks have marked."""

    count: int
    started: dict[int, str] = field(default_factory=dict)  # rank -> its host
    joining: set[int] = field(default_factory=set)  # ranks that have called init()
    joined: set[int] = field(default_factory=set)
    ended: dict[int, int] = field(default_factory=dict)  # rank -> its exit code, in the order of the marks
    overdue: dict[int, int] = field(default_factory=dict)  # rank with an overdue watchdog -> its last step, or 0
    failing: bool = False  # whether a rank has said that the job fails

    def note(self, mark: re.Match[str]) -> None:
        """Note a mark: rank, event and word."""
        rank, event, word = int(mark[1]), mark[2], mark[3]
        if rank >= self.count or (event in ("ended", "overdue") and not re.fullmatch("[0-9]{1,18}", word)):
            return  # no rank wrote this
        if event == "started":
            self.started[rank] = word
        elif event == "joining":
            self.joining.add(rank)
        elif event == "joined":
            self.joined.add(rank)
        elif event == "overdue":
            self.overdue[rank] = int(word)
        elif event == "recovered":
            self.overdue.pop(rank, None)
        elif event == "failing":
            self.failing = True
        elif event == "ended":
            self.ended[rank] = int(word)

    @property
    def state(self) -> str:
        """``"starting"``, ``"running"``, ``"finished"``, or ``"failing"`` once the job can only fail."""
        waiting = self.joining - self.joined - self.ended.keys()
        never_join = self.ended.keys() - self.joining if waiting else set()
        if self.failing or never_join or any(self.ended.values()):
            return "failing"
        if len(self.ended) == self.count:
            return "finished"
        return "running" if len(self.started) == self.count else "starting"

    @property
    def missing(self) -> str:
        """The ranks that have not started."""
        return listed(set(range(self.count)) - self.started.keys())

    @property
    def silent(self) -> str:
        """The ranks that have started and not ended, with their hosts; empty if there are none."""
        return self._names(self.started.keys() - self.ended.keys())

    def reasons(self) -> Iterator[str]:
        """Why the job failed, from what the ranks have marked: the likeliest cause first."""
        # Ranks that lost the rank that failed may be reported before it.
        for code in sorted(dict.fromkeys(self.ended.values()), key=lambda code: code == PEER_LOST):
            yield f"{self._names({rank for rank, its in self.ended.items() if its == code})} ended {_by(code)}"
        silent = self.started.keys() - self.overdue.keys() - self.ended.keys()
        if self.overdue and silent:
            why = "stopped, cut off, or busy with something else"
            yield f"{self._names(silent)} did not report when the watchdogs of the others did: {why}"
        if len(set(self.overdue.values())) > 1:
            least = min(self.overdue.values())
            behind = {rank for rank, step in self.overdue.items() if step == least}
            yield f"{self._names(behind)} came only to step {least}"
        waiting = self.joining - self.joined
        if waiting and (absent := self.started.keys() - self.joining):
            yield f"{self._names(absent)} did not call init(), and {listed(waiting)} waited there"

    def _names(self, ranks: Collection[int]) -> str:
        return ", ".join(f"rank {rank} on {self.started[rank]}" for rank in sorted(ranks) if rank in self.started)


def _by(code: int) -> str:
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(code - 128).name}"
    return f"with exit code {code}" + (" (it had lost another rank)" if code == PEER_LOST else "")
