"""Draw recorded runs: one page that any browser opens from the file, without a network, and a picture.

    distclip report runs/a.jsonl runs/b.jsonl --output report.html --png report.png

The records are written by distclip.Recorder. What is cut off or damaged in one is left out, and the page says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from distclip.records.page import Line, Mark, Panel, draw, page
from distclip.records.read import NAMES, Records, read_records, was_clipped

WINDOW = 50  # steps over which the shares of clipped and skipped steps are taken
SPIKE = 3.0  # a norm of so many thresholds is marked
FAR = 5.0  # and a rank whose norm is so many times the ranks' median
COLUMNS = 500  # a line is thinned to the least and the greatest value of each; also of a heat map
ROWS = 40  # of a heat map: the largest

Step = dict[str, Any]


@dataclass
class Run:
    name: str
    records: Records
    number: int

    @property
    def steps(self) -> list[Step]:
        return self.records.steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN.jsonl", help="records of runs, drawn side by side")
    add("--output", type=Path, metavar="DIR|FILE.html", help="the page (default: beside the first record)")
    add("--png", type=Path, metavar="FILE.png", help="draw the same as a picture (needs distclip[plot])")


def run(args: argparse.Namespace) -> int:
    output = args.output or Path(args.runs[0]).with_suffix(".html")
    output = output / "report.html" if output.is_dir() else output
    for path in filter(None, (output, args.png)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            args.error(f"{path} is no file in a folder that exists")
        if path.resolve() in {Path(name).resolve() for name in args.runs}:
            args.error(f"{path} is a record: name another file for the report")
    if args.png and args.png.suffix != ".png":
        args.error(f"{args.png} should end in .png")
    if args.png and importlib.util.find_spec("matplotlib") is None:
        args.error('--png needs matplotlib: pip install "distclip[plot]"')
    try:
        runs = read_runs(args.runs)
    except (OSError, ValueError) as error:
        args.error(str(error))
    notes = [f"{one.name}: {text}" for one in runs for text in left_out(one.records)]
    for note in notes:
        print(note, file=sys.stderr)
    panels = panels_of(runs)
    if args.png and not panels:
        args.error("there are no steps to draw")
    try:
        output.write_bytes(page(runs, panels, table(runs), notes).encode(errors="replace"))
        print(f"the report is in {output}")
        if args.png:
            draw(panels, args.png)
            print(f"the picture is in {args.png}")
    except OSError as error:
        args.error(str(error))
    return 0


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs, named after their files, with as much of the folders as tells them apart."""
    names = [Path(path).stem for path in paths]
    twice = {name for name, count in Counter(names).items() if count > 1}
    names = [path if name in twice else name for path, name in zip(paths, names, strict=True)]
    return [Run(name, read_records(path), i) for i, (path, name) in enumerate(zip(paths, names, strict=True))]


def left_out(records: Records) -> list[str]:
    """What the report does not show, in words."""
    said = []
    if records.damaged:
        first = ", ".join(f"{number} ({why})" for number, why in records.damaged[:5])
        more = f" and {len(records.damaged) - 5} more" if len(records.damaged) > 5 else ""
        said.append(f"damaged lines are left out: line {first}{more}")
    if records.dropped:
        said.append(f"{records.dropped} steps could not be written when they were recorded")
    if not records.steps:
        said.append("it has a header, and no steps")
    return said


# ------------------------------------------------------------------------------------------------ what is drawn


def panels_of(runs: list[Run]) -> list[Panel]:
    extras = list(dict.fromkeys(name for run in runs for name in _extras(run)))
    losses = [name for name in extras if "loss" in name or name.startswith("val")]
    found = [_curves(runs, ", ".join(losses), losses)] if losses else []
    norms = _curves(runs, "gradient norm before clipping, and threshold", ["norm", "threshold"], log=True)
    norms.marks = [mark for run in runs for mark in spikes(run)]
    found += [norms, _shares(runs)]
    for run in runs:
        found += _heat(run, "groups", "group norms", lambda name: name)
        hosts = run.records.hosts
        found += _heat(run, "rank_norms", "norms of the ranks", lambda i, hosts=hosts: _rank(i, hosts))  # type: ignore[misc]
    found.append(_curves(runs, "gradient noise scale (rows of a batch; where above 0)", ["noise_scale"], log=True))
    found.append(_curves(runs, "time of a step (s)", ["step_s"], log=True))
    found += [_curves(runs, name, [name]) for name in extras if name not in losses]
    steps = [step["step"] for run in runs for step in run.steps] or [0]
    for panel in found:
        panel.span = panel.span if panel.cells else (min(steps), max(max(steps), min(steps) + 1))
    return [panel for panel in found if panel.lines or panel.cells or panel.marks]


def _extras(run: Run) -> list[str]:
    return list(dict.fromkeys(name for step in run.steps for name in step if name not in NAMES and name != "step"))


def _curves(runs: list[Run], title: str, names: list[str], *, log: bool = False) -> Panel:
    panel = Panel(title)
    for run in runs:
        for dash, name in enumerate(names):
            points = [(s["step"], s[name]) for s in run.steps if isinstance(s.get(name), (int, float))]
            if points:
                panel.lines.append(Line(run.number, f"{run.name}: {name}", *thinned(points), dash % 4))
    low, high = panel.range()
    panel.log = log or (low > 0 and high > 20 * low)
    return panel


def thinned(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """The least, the greatest and a value that is not finite of each column: no spike is lost."""
    if len(points) <= 2 * COLUMNS:
        kept = points
    else:
        size, kept = math.ceil(len(points) / COLUMNS), []
        for start in range(0, len(points), size):
            part = points[start : start + size]
            finite = [point for point in part if math.isfinite(point[1])]
            chosen = {min(finite, key=_y), max(finite, key=_y)} if finite else set()
            chosen |= set([point for point in part if not math.isfinite(point[1])][:1])
            kept += sorted(chosen, key=lambda point: point[0])
    return [x for x, _ in kept], [y for _, y in kept]


def _y(point: tuple[int, float]) -> float:
    return point[1]


def factor(step: Step) -> float:
    """How many thresholds the norm was, with a threshold per group the most; infinite if it was not finite."""
    if not math.isfinite(step["norm"]):
        return math.inf
    threshold, scale = step.get("threshold"), step.get("scale")
    if isinstance(threshold, (int, float)) and threshold > 0:
        return float(step["norm"] / threshold)
    scales = [s for s in scale.values() if s > 0] if isinstance(scale, dict) else []
    return float(1 / min(scales, default=1.0))


def spikes(run: Run) -> list[Mark]:
    """The worst step of each column that was clipped by ``SPIKE`` or was not finite."""
    worst: dict[tuple[int, bool], tuple[float, Step]] = {}
    size = math.ceil(len(run.steps) / COLUMNS)
    for i, step in enumerate(run.steps):
        times = factor(step)
        place = (i // size, times == math.inf)
        if times >= SPIKE and times > worst.get(place, (0.0, step))[0]:
            worst[place] = times, step
    return [_mark(run, step, times) for times, step in worst.values()]


def _mark(run: Run, step: Step, times: float) -> Mark:
    bad = times == math.inf
    who = f" ({', '.join(culprits(step, run.records.hosts))})" if culprits(step, run.records.hosts) else ""
    what = f"norm {step['norm']}" if bad else f"{times:.3g} x the threshold"
    skipped = ", skipped" if step.get("skipped") else ""
    return Mark(run.number, step["step"], math.inf if bad else step["norm"], f"{run.name}: {what}{skipped}{who}")


def culprits(step: Step, hosts: list[str]) -> list[str]:
    """The ranks whose own norm was not finite, or far above the others'."""
    norms = step.get("rank_norms", [])
    finite = [norm for norm in norms if math.isfinite(norm)]
    limit = FAR * sorted(finite)[(len(finite) - 1) // 2] if len(finite) > 1 else math.inf
    return [_rank(i, hosts) for i, norm in enumerate(norms) if not math.isfinite(norm) or norm > limit]


def _rank(i: int, hosts: list[str]) -> str:
    return f"rank {i}" + (f" on {hosts[i]}" if i < len(hosts) else "")


def _shares(runs: list[Run]) -> Panel:
    panel = Panel(f"clipped and skipped, % of {WINDOW} recorded steps")
    kinds: list[tuple[str, Callable[[Step], bool]]] = [
        ("clipped", was_clipped),
        ("skipped", lambda s: s.get("skipped", False)),
    ]
    for run in runs:
        for dash, (name, kind) in enumerate(kinds):
            yes, points = [0], []
            for i, step in enumerate(run.steps, 1):
                yes.append(yes[-1] + bool(kind(step)))
                since = max(0, i - WINDOW)
                points.append((step["step"], 100 * (yes[i] - yes[since]) / (i - since)))
            if points and (yes[-1] or name == "clipped"):
                panel.lines.append(Line(run.number, f"{run.name}: {name}", *thinned(points), dash))
    return panel


def _heat(run: Run, key: str, title: str, name: Callable[[Any], str]) -> list[Panel]:
    """The greatest norm of each row and column; a column with a value that is not finite says so."""
    steps = [step for step in run.steps if step.get(key)]
    if not steps:
        return []
    first, last = steps[0]["step"], steps[-1]["step"]
    count = min(last - first + 1, COLUMNS)
    rows: dict[Any, list[Any]] = {}
    for step in steps:
        column = (step["step"] - first) * count // (last - first + 1)
        found = step[key]
        for row, value in found.items() if isinstance(found, dict) else enumerate(found):
            cells = rows.setdefault(row, [None] * count)
            worst = cells[column]
            if worst is None or not value <= worst:  # NaN stays
                cells[column] = value if worst is None or worst == worst else worst
    shown = list(rows)
    if len(rows) > ROWS:
        size = {
            row: max((c for c in cells if c is not None and c < math.inf), default=0) for row, cells in rows.items()
        }
        largest = sorted(rows, key=size.__getitem__, reverse=True)
        shown = [row for row in rows if row in set(largest[:ROWS])]
        title += f", the {ROWS} largest of {len(rows)}"
    panel = Panel(f"{title}: {run.name}", log=True, rows=[name(row) for row in shown], span=(first, last + 1))
    panel.cells = [rows[row] for row in shown]
    return [panel]


def table(runs: list[Run]) -> list[list[str]]:
    """A row of words for each run, under a row of headings."""
    heads = "run,steps,clipped,skipped,not finite,median norm,worst norm,median step,not recorded,ranks to look at"
    return [heads.split(","), *(_row(run) for run in runs)]


def _row(run: Run) -> list[str]:
    steps, records = run.steps, run.records
    if not steps:
        return [run.name, "0", *["-"] * 8]
    finite = [step for step in steps if math.isfinite(step["norm"])]
    worst = max(finite, key=lambda step: float(step["norm"]), default=None)
    seconds = [step["step_s"] for step in steps if "step_s" in step]
    clipped, skipped = sum(map(was_clipped, steps)), sum(bool(step.get("skipped")) for step in steps)
    who = Counter(name for step in steps for name in culprits(step, records.hosts))
    again = f", started {len(records.headers)} times" if len(records.headers) > 1 else ""
    every = records.headers[-1].get("every") if records.headers else 1
    gaps = sum(b["step"] - a["step"] > every for a, b in pairwise(steps)) if isinstance(every, int) else 0
    missing = [f"{records.dropped} dropped"] * bool(records.dropped) + [f"{gaps} gaps"] * bool(gaps)
    missing += [f"{len(records.damaged)} damaged lines"] * bool(records.damaged)
    return [
        run.name,
        f"{len(steps):,} ({steps[0]['step']:,} to {steps[-1]['step']:,}{again})",
        f"{clipped / len(steps):.1%}",
        f"{skipped:,}",
        f"{len(steps) - len(finite):,}",
        f"{median(step['norm'] for step in finite):.4g}" if finite else "-",
        f"{worst['norm']:.4g} at step {worst['step']:,}" if worst else "-",
        f"{median(seconds) * 1e3:.3g} ms" if seconds else "-",
        ", ".join(missing) or "nothing",
        ", ".join(f"{name}: {count:,} steps" for name, count in who.most_common(5)) or "none",
    ]
