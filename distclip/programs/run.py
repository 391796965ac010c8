"""Run any program that trains with MLX, with every optimizer of its clipped and guarded.

    distclip run -m mlx_lm lora --model MODEL --data DATA --train
    distclip run --max-norm 0.5 --record run.jsonl train.py --epochs 3
    mpirun -n 2 distclip run -m mlx_lm lora --model MODEL --data DATA --train

The options of distclip come first, then ``-m`` and a module, or a script, with the arguments of that program. Rank 0
says which steps were skipped and, at the end, how many were clipped.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import io
import math
import os
import runpy
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

EVERY_RANK_PRINTS = True  # the program is the user's
POLICIES = ("skip", "zero", "propagate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``distclip run``."""
    parser.usage = "%(prog)s [OPTIONS] (-m MODULE | SCRIPT) ..."
    add_clipping_arguments(parser, "--max-norm")
    text = "skip a finite step above this norm too; 'spike' learns the limit"
    parser.add_argument("--skip-above", type=_limit, metavar="NORM", help=text)
    text = "average the gradients over the ranks first: for a program that does not"
    parser.add_argument("--average", action="store_true", help=text)
    text = "send norms to this tracker too: wandb, swanlab, mlflow, tensorboard; may be given again"
    parser.add_argument("--track", action="append", default=[], metavar="NAME", help=text)
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help="run a module, as python -m"
    )
    parser.add_argument(
        "script", nargs=argparse.REMAINDER, metavar="SCRIPT", help="run a script; arguments of it follow"
    )


def add_clipping_arguments(parser: argparse.ArgumentParser, max_norm: str) -> None:
    """Add the options that say how to clip, and where to record.

    Args:
        max_norm: the name of the option for the threshold.
    """
    threshold = parser.add_mutually_exclusive_group()
    text, norm = "the threshold; 0 clips nothing; default: %(default)s", _between(0, math.inf)
    threshold.add_argument(max_norm, dest="max_norm", type=norm, default=1.0, metavar="NORM", help=text)
    text = "the threshold is a percentile of the norms so far"
    threshold.add_argument("--auto-clip", type=_between(0, 100), metavar="PERCENTILE", help=text)
    threshold.add_argument("--zclip", action="store_true", help="the threshold is learned from mean and deviation")
    text = "what is done about a gradient that is not finite; default: %(default)s"
    parser.add_argument("--nonfinite", choices=POLICIES, default="skip", help=text)
    parser.add_argument("--record", metavar="FILE", help="append a line of JSON for each step")


def threshold_of(args: argparse.Namespace) -> Any:
    """The threshold that options ask for, as :class:`distclip.Clipper` takes it."""
    from distclip.thresholds import AutoClip, ZClip

    if args.auto_clip is not None:
        return AutoClip(args.auto_clip)
    return ZClip() if args.zclip else args.max_norm


def run(args: argparse.Namespace) -> int:
    """Run the program; return 0 when it ends. What it raises passes through, ``SystemExit`` too."""
    program = args.module if args.module is not None else args.script
    if not program:
        args.error("name the program to run, after the options: -m MODULE, or a script")
    if args.module is None and not os.path.exists(program[0]):
        args.error(f"there is no script {program[0]}")
    if args.skip_above is not None and args.nonfinite != "skip":
        args.error("--skip-above needs --nonfinite skip")

    try:
        from distclip.programs.every_optimizer import clipped_optimizers
        from distclip.spikes import Spike
        from distclip.world import init
    except ImportError as error:
        sys.exit(f"distclip run cannot start: {error}; `distclip doctor` says what to do")

    init()  # before the program starts MPI
    options: dict[str, Any] = {"nonfinite": args.nonfinite, "average": args.average}
    options["skip_above"] = Spike() if args.skip_above == "spike" else args.skip_above
    with contextlib.ExitStack() as stack:
        if args.record or args.track:
            options["on_step"] = stack.enter_context(_recorder(args, program))
        stack.enter_context(clipped_optimizers(threshold_of(args), **options))
        _start(program, is_module=args.module is not None)
    return 0


def _recorder(args: argparse.Namespace, program: list[str]) -> Any:
    from distclip.records.write import Recorder

    names = ("max_norm", "auto_clip", "zclip", "nonfinite", "skip_above", "average")
    given = {name: value for name, value in vars(args).items() if name in names and value not in (None, False)}
    try:
        return Recorder(args.record, config={"program": " ".join(program)} | given, sinks=args.track)
    except (ImportError, OSError, ValueError) as error:
        args.error(str(error))


def _start(program: list[str], *, is_module: bool) -> None:
    """Run a program as ``python`` does: its arguments, its ``__main__``, and the folder that imports begin at."""
    name, sys.argv = program[0], list(program)
    if not getattr(sys.flags, "safe_path", False):  # of Python 3.11
        sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.realpath(name))
    if is_module:
        if not _exists(name):
            sys.exit(f"distclip run: there is no module {name}")
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    if os.path.isdir(name) or zipfile.is_zipfile(name):
        runpy.run_path(name, run_name="__main__")
        return
    main, path = ModuleType("__main__"), os.path.join(os.getcwd(), name)
    vars(main).update(__file__=path, __builtins__=builtins)
    with io.open_code(path) as script:
        code = compile(script.read(), path, "exec", dont_inherit=True)
    sys.modules["__main__"] = main  # until the process ends
    exec(code, vars(main))


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError as error:  # of the packages that it is in, or of what these import
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return False
        raise


def _between(least: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not least <= (value := float(text)) <= most:
            raise argparse.ArgumentTypeError(f"should be between {least:g} and {most:g}, not {text}")
        return value

    return number


def _limit(text: str) -> float | str:
    return text if text == "spike" else _between(0, math.inf)(text)
