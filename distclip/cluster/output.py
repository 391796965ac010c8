"""What ranks print, on its way from mpirun to the screen: each line with its rank, without the marks.

mpirun passes on each block that it has read of a rank, with the rank before it (``--output rank:raw``). Without ``raw``
it holds back what has no newline, such as a progress bar, at a cost that grows with the square. Here blocks become
lines again. What has no newline after ``HOLD_S`` is shown as it is, and goes on in its line while nobody else prints.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from distclip.marks import MARK

HOLD_S = 0.1
HOLD_CHARACTERS = 2**16
TAG = re.compile(rb"\[(\d{1,9})\]<(?:stdout|stderr)>: ")
TAG_BEGINS = re.compile(rb"\[\d{0,9}(\](<([a-z]{0,6}|std(out|err)>:?))?)?$")  # at the end of a block
MARKED = re.compile(rf"{MARK} (\d{{1,9}}) (started|ended|joining|joined|overdue|recovered|failing) (\S+)")
MARK_BEGINS = re.compile(rf"({MARK}|{MARK[:-1]}$|{MARK[:-2]}$|{MARK[:-3]}$|{MARK[:-4]}$).*", re.DOTALL)
RULE = "-" * 74  # before and after a message of mpirun itself


class Screen:
    """Standard output and error. What cannot be written is lost, and said once: it ends nothing."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, ...], Line] = {}  # the line at the cursor of each file, which has no end yet
        self._lost: set[TextIO] = set()

    def show(self, line: Line, file: TextIO, text: str, *, ends: bool) -> None:
        """Show text of a line; its rank goes before it where the cursor is not at this line."""
        where = _place(file)
        other = self._open.get(where)
        if other is not line:
            text = line.tag + text.removeprefix("\r")
        before = "\n" if other is not None and other is not line else ""
        if ends:
            self._open.pop(where, None)
        else:
            self._open[where] = line
        self._write(file, before + text.replace("\r", "\r" + line.tag) + ("\n" if ends else ""))

    def is_terminal(self) -> bool:
        """Whether a person looks on."""
        with contextlib.suppress(ValueError, AttributeError):  # closed, or none
            return sys.stdout.isatty()
        return False

    def is_at(self, line: Line) -> bool:
        """Whether the cursor is at the end of a line."""
        return any(line is each for each in self._open.values())

    def say(self, text: str) -> None:
        """Show a message of the launcher."""
        self.show(Line(""), sys.stderr, f"distclip: {text}", ends=True)

    def _write(self, file: TextIO, text: str) -> None:
        error = write(file, text)
        if error is not None and file not in self._lost:
            self._lost.add(file)
            name = "standard output" if file is sys.stdout else "standard error"
            other = sys.stderr if file is sys.stdout else sys.stdout
            write(other, f"distclip: {name} cannot be written ({error.strerror}); the job goes on\n")


def _place(file: TextIO) -> tuple[int, ...]:
    """Equal for two files that are one terminal, pipe or disk file."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stat = os.fstat(file.fileno())
        return stat.st_dev, stat.st_ino
    return (id(file),)


def write(file: TextIO | None, text: str) -> OSError | None:
    """Write all of a text to a standard stream, and return the error; nothing to one that is closed."""
    if file is None:
        return None
    try:
        descriptor = file.fileno()
    except (OSError, ValueError):  # closed, or of a test
        with contextlib.suppress(ValueError):
            file.write(text)
        return None
    rest = memoryview(text.encode(file.encoding or "utf-8", errors="backslashreplace"))
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # another program has made the terminal so
            select.select([], [descriptor], [])
        except OSError as error:
            return error
    return None


@dataclass(eq=False)
class Line:
    """The line that a rank, or mpirun itself, writes."""

    tag: str
    text: str = ""  # what is not shown yet
    since: float = 0.0  # when that came
    shown: str = ""  # the end of what is shown: a mark may have begun in it
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def showable(self) -> str:
        """The text without what looks like a mark, and without a return before what follows it."""
        return MARK_BEGINS.sub("", self.text).rstrip("\r")


class Output:
    """Standard output or error of mpirun."""

    def __init__(self, file: TextIO, screen: Screen, note: Callable[[re.Match[str]], None]):
        self.spoke = False  # whether mpirun itself wrote something
        self._file, self._screen, self._note = file, screen, note
        self._mpirun = self._line = Line("")
        self._ranks: dict[str, Line] = {}
        self._rest, self._came = b"", 0.0  # what may begin a tag, and when
        self._in_message = False  # of mpirun

    def take(self, block: bytes) -> None:
        """Take what mpirun wrote; show the lines that have ended."""
        data = (self._rest + block).replace(b"\0", b"")
        begins = TAG_BEGINS.search(data)
        end = begins.start() if begins else len(data)
        self._rest, self._came = data[end:], time.monotonic()
        first, *others = TAG.split(data[:end])
        self._add(first)
        for rank, own in zip(others[::2], others[1::2], strict=True):
            name = rank.decode()
            self._line, self._in_message = self._ranks.setdefault(name, Line(f"[{name}] ")), False
            self._add(own)

    def show_unfinished(self) -> bool:
        """Show what has waited for its end; return whether something still waits."""
        now = time.monotonic()
        if self._rest and now - self._came >= HOLD_S:
            self._rest, rest = b"", self._rest
            self._add(rest)
        waiting = bool(self._rest)
        for line in (self._mpirun, *self._ranks.values()):
            if not (text := line.showable()):
                continue
            if now - line.since >= HOLD_S:
                self._show_part(line, text)
            else:
                waiting = True
        return waiting

    def end(self) -> None:
        """Show what is left."""
        self._add(self._rest)
        for line in (self._mpirun, *self._ranks.values()):
            if text := line.text + line.decoder.decode(b"", final=True):
                self._end_line(line, text)
            elif self._screen.is_at(line):
                self._screen.show(line, self._file, "", ends=True)

    def _add(self, data: bytes) -> None:
        line = self._line
        text = line.decoder.decode(data)
        if not text:
            return
        line.since = line.since if line.text else time.monotonic()
        *ended, line.text = (line.text + text).split("\n")
        for each in ended:
            self._end_line(line, each)
        if ended:
            line.since = time.monotonic()
        if len(line.text) > HOLD_CHARACTERS:
            self._show_part(line, line.showable())

    def _end_line(self, line: Line, text: str) -> None:
        whole = MARKED.sub(self._take_mark, line.shown + text)
        rest, line.shown = whole.removeprefix(line.shown) if whole.startswith(line.shown) else "", ""
        if rest == RULE:
            self._in_message = not self._in_message
        if rest == RULE or self._in_message:
            line = self._mpirun
        if rest.strip() or (rest == text and self._screen.is_at(line)):  # the newline behind a mark is the mark's
            self.spoke = self.spoke or line is self._mpirun
            self._screen.show(line, self._file, rest.rstrip("\r"), ends=True)

    def _show_part(self, line: Line, text: str) -> None:
        if text:
            self._screen.show(line, self._file, text, ends=False)
            line.text, line.shown = line.text[len(text) :], (line.shown + text)[-len(MARK) :]

    def _take_mark(self, mark: re.Match[str]) -> str:
        self._note(mark)
        return ""
