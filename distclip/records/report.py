"""Draw recorded runs: a page that any browser opens without a network, and a picture.

    distclip report runs/a.jsonl runs/b.jsonl --output report.html --png report.png

distclip.Recorder writes the records. Lines that are cut off or damaged are left out, and the page says so. Matplotlib
draws: pip install matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN.jsonl", help="records of runs, drawn side by side")
    add("--output", type=Path, metavar="DIR|FILE.html", help="the page (default: beside the first record)")
    add("--png", type=Path, metavar="FILE.png", help="draw the same as a picture")


def run(args: argparse.Namespace) -> int:
    output = args.output or Path(args.runs[0]).with_suffix(".html")
    output = output / "report.html" if output.is_dir() else output
    _check(args, output)
    from distclip.records.columns import read_columns
    from distclip.records.figure import png
    from distclip.records.page import left_out, page
    from distclip.records.panels import Run, panels_of

    names = [Path(path).stem for path in args.runs]
    names = [path if names.count(name) > 1 else name for path, name in zip(args.runs, names, strict=True)]
    try:
        runs = [Run(name, i, read_columns(path)) for i, (path, name) in enumerate(zip(args.runs, names, strict=True))]
        notes = [note for run in runs for note in left_out(run)]
        for note in notes:
            print(note, file=sys.stderr)
        panels = panels_of(runs)
        if args.png and not panels:
            args.error("there are no steps to draw")
        output.write_bytes(page(runs, panels, notes).encode(errors="replace"))
        print(f"the report is in {output}")
        if args.png:
            png(panels, args.png)
            print(f"the picture is in {args.png}")
    except (OSError, ValueError) as error:
        args.error(str(error))
    return 0


def _check(args: argparse.Namespace, output: Path) -> None:
    """End with an error before anything is read, if the report could not be written."""
    for path in filter(None, (output, args.png)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            args.error(f"{path} is no file in a folder that exists")
        if path.resolve() in {Path(name).resolve() for name in args.runs}:
            args.error(f"{path} is a record: name another file for the report")
    if args.png and args.png.suffix != ".png":
        args.error(f"{args.png} should end in .png")
    if importlib.util.find_spec("matplotlib") is None:
        args.error("the report is drawn by matplotlib: pip install matplotlib")
