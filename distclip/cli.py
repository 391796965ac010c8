"""The command line: ``distclip COMMAND``. It starts where MLX is missing or broken."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import NoReturn

from distclip.marks import launched_rank

# Command -> its module, which has ``add_arguments(parser)`` and ``run(args) -> int``, and a line of help. Only the
# module of the command that runs is imported. ``args.error(message)`` ends a command with the error of a bad option.
# Where ranks run a command, rank 0 alone prints, unless its module says that all do: EVERY_RANK_PRINTS.
COMMANDS = {
    "run": ("distclip.programs.run", "run any program that trains with MLX, with its optimizers clipped"),
    "doctor": ("distclip.cluster.doctor", "find what would stop a run, on this machine or on several hosts"),
    "launch": ("distclip.cluster.launch", "run a script on several hosts: check them, start it, watch it"),
    "bench": ("distclip.bench", "measure distclip beside MLX, PyTorch and optax, on this machine"),
    "report": ("distclip.records.report", "draw recorded runs: a page and a picture"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of this process), and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    with _only_rank_0_prints():
        args = _parser(argv).parse_args(argv)
        if not args.every_rank_prints:
            return int(args.run(args))
    return int(args.run(args))


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distclip", description="Gradient clipping by the true global norm for MLX.")
    parser.add_argument("--version", action="version", version=f"distclip {version('distclip')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module_name, text) in COMMANDS.items():
        if name not in argv[:1]:
            commands.add_parser(name, help=text)
            continue
        module = import_module(module_name)
        command = commands.add_parser(
            name, help=text, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        every = getattr(module, "EVERY_RANK_PRINTS", False)
        error = partial(_error, command) if every else command.error  # which is called where rank 0 alone prints
        command.set_defaults(run=module.run, error=error, every_rank_prints=every)
    return parser


def _error(command: argparse.ArgumentParser, message: str) -> NoReturn:
    with _only_rank_0_prints():
        command.error(message)


@contextlib.contextmanager
def _only_rank_0_prints() -> Iterator[None]:
    """Silence the other ranks: every rank finds the same error in the options."""
    if launched_rank(os.environ) == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except SystemExit:
            time.sleep(1)  # the launcher ends all ranks when one fails, and rank 0 still has to print its error
            raise
