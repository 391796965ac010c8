"""``distclip report``: the page in a real browser, the picture, and records that are damaged, huge or none at all."""

from __future__ import annotations

import html
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distclip.records.read import KIND, Records, read_records

np = pytest.importorskip("numpy", reason="matplotlib, and numpy with it, is not installed: no report is drawn")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: no report is drawn")
from distclip.records import columns, panels  # noqa: E402
from distclip.records.figure import svg  # noqa: E402
from distclip.records.page import LISTED, events, summary  # noqa: E402

pytestmark = pytest.mark.launches

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADLESS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
HEADLESS += " --disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=2000"
HOSTS = ["mac-a", "mac-a", "mac-b"]


def write(path: Path, steps: int, *, seed: int = 0, bad: tuple[int, ...] = (), spikes: tuple[int, ...] = ()) -> None:
    """A record of a run of three ranks, whose third is at fault for each bad step and each spike."""
    choose = random.Random(seed)
    with path.open("w") as file:
        print(json.dumps({"kind": KIND, "format": 1, "every": 1, "config": {"rate": "<b>"}}), file=file)
        for i in range(1, steps + 1):
            norm = choose.uniform(0.5, 1.2) * (50 if i in spikes else 1)
            own = [norm, norm * 1.1, norm * (20 if i in spikes else 0.9)]
            line: dict[str, Any] = {"step": i, "norm": norm, "threshold": 1.0, "finite": i not in bad}
            line |= {"clipped": norm > 1, "skipped": i in bad, "groups": {"attention": norm / 2, "mlp": norm / 3}}
            line |= {"rank_norms": own, "noise_scale": 10.0 + i, "loss": 3 / i, "valid": 3 / i, "step_s": 0.01}
            if i in bad:
                line |= {"norm": "nan", "rank_norms": [1.0, 1.0, "inf"], "groups": {"attention": "nan", "mlp": 0.1}}
            print(json.dumps(line | ({"rank_hosts": HOSTS} if i == 1 else {})), file=file)


def distclip(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distclip", "report", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def page_of(*arguments: str | Path, folder: Path) -> str:
    ended = distclip(*arguments, "--output", "report.html", folder=folder)
    assert ended.returncode == 0, ended.stderr
    return (folder / "report.html").read_text()


def rows_of(page: str, number: int = 0) -> list[list[str]]:
    """The cells of a table of the page."""
    table = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)[number]
    return [
        [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    ]


def steps_of(page: str) -> list[list[str]]:
    """The table of the steps that stood out."""
    return rows_of(page.partition("<h2>The runs</h2>")[0])


def runs_of(page: str) -> list[dict[str, str]]:
    """The table of the runs: for each what it says."""
    names, *runs = zip(*rows_of(page.partition("<h2>The runs</h2>")[2]), strict=True)
    return [dict(zip(names, run, strict=True)) for run in runs]


def sentences_of(page: str) -> list[str]:
    """What stood out, in words, of each run."""
    return [html.unescape(re.sub("<[^>]*>", "", text)) for text in re.findall(r"<li>(.*?)</li>", page)]


def run_of(path: Path, number: int = 0) -> panels.Run:
    return panels.Run(path.stem, number, columns.read_columns(path))


# ------------------------------------------------------------------------------------------------- in a browser


def browse(page: Path, *options: str) -> str:
    """What a browser prints about the page."""
    if CHROMIUM is None:
        if os.environ.get("DISTCLIP_REQUIRE_CHROMIUM") == "1":
            pytest.fail("there is no Chromium, and DISTCLIP_REQUIRE_CHROMIUM=1 says that there must be")
        pytest.skip("there is no Chromium here: the page is not opened in a browser")
    folder = page.parent / "browser"
    command = [CHROMIUM, *HEADLESS.split(), f"--user-data-dir={folder}", *options, page.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_browser_shows_every_panel_of_two_runs(tmp_path: Path) -> None:
    write(tmp_path / "first.jsonl", 300, bad=(100,), spikes=(200,))
    write(tmp_path / "<script>throw 1<.jsonl", 200, seed=1)
    page_of("first.jsonl", "<script>throw 1<.jsonl", folder=tmp_path)
    shown = browse(tmp_path / "report.html", "--dump-dom")
    texts = re.findall(r"<text[^>]*>(.*?)</text>", shown)
    strange = "&lt;script&gt;throw 1&lt;"
    titles = [
        "loss, valid",
        "gradient norm before clipping, and threshold",
        "clipped and skipped, % of 50 recorded steps",
        *("group norms: first", f"group norms: {strange}"),
        *("norms of the ranks: first", f"norms of the ranks: {strange}"),
        "gradient noise scale (rows of a batch; where above 0)",
        "time of a step (s)",
    ]
    assert [text for text in texts if text in titles] == titles
    assert {f"{name}: {line}" for name in ("first", strange) for line in ("norm", "threshold", "clipped")} <= {*texts}
    assert {"first: skipped", "rank 2 on mac-b", "attention", "norm not finite", "3 thresholds or more"} <= {*texts}
    assert shown.count("<image") == 8, "a heat map and its scale, four times"


def test_the_page_is_drawn_and_needs_no_network(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 100)
    page = page_of("run.jsonl", folder=tmp_path)
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+|\ssrc=|@import|<link", page)
    browse(tmp_path / "report.html", f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1000,900")
    assert (tmp_path / "shot.png").stat().st_size > 20_000


# -------------------------------------------------------------------------------------------------- the tables


def test_the_table_counts_what_the_record_has(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 100, bad=(10, 11), spikes=(50,))
    (shown,) = runs_of(page_of("run.jsonl", folder=tmp_path))
    steps = read_records(tmp_path / "run.jsonl").steps
    assert shown["steps"] == "100 (1 to 100)"
    assert shown["clipped"] == f"{sum(step['clipped'] for step in steps):.1f}%"
    assert (shown["skipped"], shown["not finite"], shown["spikes"], shown["threshold"]) == ("2", "2", "1", "1")
    assert "tokens" not in shown
    assert shown["worst norm"] == f"{steps[49]['norm']:.4g} at step 50"
    assert shown["median step"] == "10 ms"
    assert shown["ranks to look at"] == "rank 2 on mac-b: 3 steps"


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "run.jsonl", 10)
    rows = runs_of(page_of("a/run.jsonl", "b/run.jsonl", folder=tmp_path))
    assert [row["run"] for row in rows] == ["a/run.jsonl", "b/run.jsonl"]


def test_what_stood_out_comes_first_in_words(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 100, bad=(10, 11), spikes=tuple(range(20, 80, 10)))
    write(tmp_path / "b.jsonl", 100)
    page = page_of("a.jsonl", "b.jsonl", folder=tmp_path)
    steps = read_records(tmp_path / "a.jsonl").steps
    worst = sorted(sorted(range(20, 80, 10), key=lambda step: -steps[step - 1]["norm"])[:5])
    first, second = sentences_of(page)
    parts = first.split("; ")
    assert parts[0] == "a: 2 steps (10, 11) skipped, since their norm was not finite"
    assert parts[1] == f"6 steps (the worst: {', '.join(map(str, worst))}) with a norm of 3 thresholds or more"
    assert parts[2].startswith(
        "rank 2 on mac-b far above the other ranks, or not finite, at 8 steps (the worst: 10, 11"
    )
    assert second == "b: nothing"
    places = [page.index(text) for text in ("What stood out", "<details", "The runs", "<svg")]
    assert places == sorted(places)


def test_tokens_are_those_of_the_whole_run(tmp_path: Path) -> None:
    for name, tokens in (("each", [512, 512, 500]), ("so far", [512, 1024, 1524]), ("none", [None] * 3)):
        lines: list[dict[str, Any]] = [{"kind": KIND, "format": 1}]
        lines += [{"step": i, "norm": 1.0} | ({"tokens": n} if n else {}) for i, n in enumerate(tokens)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shown = runs_of(page_of("each.jsonl", "so far.jsonl", "none.jsonl", folder=tmp_path))
    assert [run["tokens"] for run in shown] == ["1,524", "1,524", "-"]


def test_text_of_a_record_is_harmless(tmp_path: Path) -> None:
    evil = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>\ud800"
    header = {"kind": KIND, "format": 1, "config": {evil: evil}}
    line = {
        "step": 1,
        "norm": 1.0,
        "groups": {evil: 1.0},
        evil: 2.0,
        "rank_norms": [1.0, 90.0],
        "rank_hosts": [evil] * 2,
    }
    lines = [header, line, line | {"step": 2, "norm": "inf", "rank_norms": [1.0, "nan"]}]
    (tmp_path / "run.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = page_of("run.jsonl", folder=tmp_path)
    assert "<img" not in page
    assert "<script" not in page
    shown = browse(tmp_path / "report.html", "--dump-dom")
    assert "<title>Gradient clipping: run</title>" in shown
    assert "<img" not in shown


def test_a_threshold_for_each_group_is_listed_too(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"kind": KIND, "format": 1}]
    for i in range(1, 60):
        scale = 0.1 if i == 30 else 1.0
        lines.append({"step": i, "norm": 1.0, "threshold": {"a": 1, "b": 2}, "scale": {"a": scale, "b": 1.0}})
    (tmp_path / "run.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, *rows = steps_of(page_of("run.jsonl", folder=tmp_path))
    assert rows == [["run", "30", "1", "1, 2", "10", "", "", ""]]


def test_spikes_and_skipped_steps_are_listed_with_their_numbers(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 100, bad=(10,), spikes=(50,))
    with (tmp_path / "run.jsonl").open("a") as file:
        print(json.dumps({"step": 101, "norm": 2.0, "threshold": 1.0, "skipped": True, "loss": "inf"}), file=file)
        spike = {"skip_above": "inf", "spike": False, "skipped": False}
        print(json.dumps({"step": 102, "norm": 1.0, "threshold": 1.0, **spike}), file=file)
        spike = {"skip_above": 5.0, "spike": True, "skipped": True}
        print(json.dumps({"step": 103, "norm": 7.0, "threshold": 1.0, **spike}), file=file)
    heads, *rows = steps_of(page_of("run.jsonl", folder=tmp_path))
    assert heads == ["run", "step", "norm", "threshold", "norm / threshold", "skipped", "loss", "ranks to look at"]
    norm = read_records(tmp_path / "run.jsonl").steps[49]["norm"]
    assert rows == [
        ["run", "10", "nan", "1", "", "yes", "0.3", "rank 2 on mac-b"],
        ["run", "50", f"{norm:.6g}", "1", f"{norm:.3g}", "", "0.06", "rank 2 on mac-b"],
        ["run", "101", "2", "1", "2", "yes", "inf", ""],
        ["run", "103", "7", "1", "7", "a spike", "", ""],
    ]


def test_the_worst_steps_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 1000, spikes=tuple(range(2, 402, 2)), bad=tuple(range(1, 141, 2)))
    page = page_of("run.jsonl", folder=tmp_path)
    _, *rows = steps_of(page)
    assert len(rows) == 2 * LISTED
    assert "run: 170 more such steps are not listed" in page
    norms = sorted(step["norm"] for step in read_records(tmp_path / "run.jsonl").steps if step["norm"] > 3)
    assert sorted(float(row[2]) for row in rows if row[2] != "nan") == pytest.approx(norms[-LISTED:], rel=1e-5)


def test_a_damaged_record_gives_a_report_of_what_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 50)
    lines = (tmp_path / "run.jsonl").read_text().splitlines(keepends=True)
    lines[20:22] = ["{{{\n", "\x00\x01\n"]
    lines.insert(30, json.dumps({"kind": "dropped", "steps": 7}) + "\n")
    (tmp_path / "run.jsonl").write_text("".join(lines)[:-10])
    ended = distclip("run.jsonl", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "the report is in run.html" in ended.stdout
    notes = [
        "run: damaged lines are left out: line 21 (not JSON), 22 (not JSON), 52 (cut off)",
        "run: 7 steps could not be written when they were recorded",
    ]
    assert ended.stderr.splitlines() == notes
    page = (tmp_path / "run.html").read_text()
    assert all(text in page for text in notes)
    assert runs_of(page)[0]["steps"] == "47 (1 to 49)"
    assert runs_of(page)[0]["not recorded"] == "7 dropped, 1 gaps, 3 damaged lines"


def test_a_run_without_steps_has_a_page(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 0)
    assert "it has a header, and no steps" in page_of("run.jsonl", folder=tmp_path)
    ended = distclip("run.jsonl", "--png", "run.png", folder=tmp_path)
    assert ended.returncode == 2
    assert "there are no steps to draw" in ended.stderr


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "No such file or directory"),
        (b"", "run.jsonl is empty"),
        (bytes(range(256)) * 1000, "run.jsonl is no record of distclip"),
        (b'{"step": 1, "loss": 2}\n', "run.jsonl is no record of distclip"),
    ],
    ids=["missing", "empty", "binary", "another kind"],
)
def test_another_file_gets_a_clear_error(data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "run.jsonl").write_bytes(data)
    ended = distclip("run.jsonl", folder=tmp_path)
    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "none/report.html"), "none/report.html is no file in a folder that exists"),
        (("--png", "."), ". is no file in a folder that exists"),
        (("--output", "run.jsonl"), "run.jsonl is a record: name another file for the report"),
        (("--png", "run.jsonl"), "run.jsonl is a record"),
        (("--png", "run.odd"), "run.odd should end in .png"),
    ],
)
def test_a_report_that_cannot_be_written_fails_first(options: tuple[str, str], message: str, tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 5)
    before = (tmp_path / "run.jsonl").read_bytes()
    ended = distclip("run.jsonl", *options, folder=tmp_path)
    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]
    assert (tmp_path / "run.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------------------------- the drawing


def test_a_picture_of_several_runs(tmp_path: Path) -> None:
    from matplotlib import image

    for seed, name in enumerate(("a", "b", "_$c$")):
        write(tmp_path / f"{name}.jsonl", 100, seed=seed, bad=(30,), spikes=(60,))
    ended = distclip("a.jsonl", "b.jsonl", "_$c$.jsonl", "--output", ".", "--png", "run.png", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert (tmp_path / "report.html").exists()
    pixels = (image.imread(tmp_path / "run.png")[..., :3] * 255).round().astype(int)
    assert pixels.shape[0] > 1500
    assert pixels.shape[1] > 1000
    colors = set(map(tuple, pixels.reshape(-1, 3).tolist()))
    assert {(0, 114, 178), (213, 94, 0), (0, 158, 115), (214, 39, 40)} <= colors, "a colour for each run, and red"


def test_the_same_records_make_the_same_page(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 100, bad=(30,), spikes=(60,))
    assert page_of("run.jsonl", folder=tmp_path) == page_of("run.jsonl", folder=tmp_path)


def test_without_matplotlib_a_sentence_says_what_to_install(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 5)
    program = "import sys\nsys.modules['matplotlib'] = sys.modules['numpy'] = None\n"
    program += "from distclip.cli import main\nmain(['report', 'run.jsonl'])"
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "the report is drawn by matplotlib: pip install matplotlib" in ended.stderr.splitlines()[-1]


def test_a_report_imports_no_mlx(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 5)
    program = "import sys\nsys.modules['mlx'] = None\n"
    program += "from distclip.cli import main\nsys.exit(main(['report', 'run.jsonl']))"
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_100_000_steps_are_drawn_in_seconds_and_no_spike_is_lost(tmp_path: Path) -> None:
    """A million took 12 s of a core and 313 MB: a tenth of the steps stays below both here."""
    spikes = tuple(range(777, 100_000, 5_003))
    write(tmp_path / "run.jsonl", 100_000, spikes=spikes, bad=(12_345,))
    program = "import time\nfrom distclip.cli import main\nmain(['report', 'run.jsonl', '--png', 'run.png'])\n"
    program += (
        "status = dict(line.split(':') for line in open('/proc/self/status')) if sys.platform == 'linux' else {}\n"
    )
    program += "print(time.process_time(), status.get('VmHWM', '0 kB').split()[0])"
    program = f"import sys\n{program}"
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    seconds, memory = map(float, ended.stdout.splitlines()[-1].split())
    assert seconds < 10
    assert memory < 250 * 1024
    page = (tmp_path / "run.html").read_text()
    assert len(page) < 1_000_000
    _, *rows = steps_of(page)
    assert [row[1] for row in rows] == [f"{step:,}" for step in sorted((*spikes, 12_345))]
    run = run_of(tmp_path / "run.jsonl")
    norms, heat = panels.panels_of([run])[1], panels.panels_of([run])[3]
    drawn = dict(zip(norms.lines[0].xs.tolist(), norms.lines[0].ys.tolist(), strict=True))
    assert all(drawn[step] > 20 for step in spikes)
    assert math.isnan(drawn[12_345])
    assert len(drawn) < 2_000
    assert sorted(mark.step for mark in norms.marks) == sorted((*spikes, 12_345))
    assert np.count_nonzero(np.isinf(heat.cells[0])) == 1
    assert np.max(heat.cells[0], where=np.isfinite(heat.cells[0]), initial=0) > 10


def test_thinning_keeps_the_ends_of_the_scale_of_each_column() -> None:
    choose = random.Random(0)
    steps = np.arange(20_011)
    values = np.array([choose.choice([choose.random(), math.nan, math.inf]) for _ in steps])
    xs, ys = panels.thinned(steps, values)
    assert xs.tolist() == sorted({*xs.tolist()})
    assert len(xs) <= 3 * panels.COLUMNS
    assert repr(ys.tolist()) == repr(values[xs].tolist())
    size = math.ceil(len(steps) / panels.COLUMNS)
    for start in range(0, len(steps), size):
        part, kept = values[start : start + size], ys[(xs >= start) & (xs < start + size)]
        finite, kept_finite = part[np.isfinite(part)], kept[np.isfinite(kept)]
        assert (kept_finite.min(), kept_finite.max()) == (finite.min(), finite.max())
        assert len(kept_finite) == len(kept) - (len(finite) < len(part))
    assert panels.thinned(steps[:600], values[:600])[0].tolist() == list(range(600))


def test_heat_maps_of_one_kind_have_one_scale(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 100, spikes=(60,))
    write(tmp_path / "b.jsonl", 50, seed=1)
    runs = [run_of(tmp_path / f"{name}.jsonl", number) for number, name in enumerate("ab")]
    maps = [panel for panel in panels.panels_of(runs) if panel.rows]
    assert [panel.title.partition(":")[0] for panel in maps] == ["group norms"] * 2 + ["norms of the ranks"] * 2
    assert maps[0].scale == maps[1].scale != maps[2].scale == maps[3].scale
    assert {panel.span for panel in panels.panels_of(runs)} == {(1, 100)}, "steps stand above each other"


def test_of_several_spikes_in_a_column_the_worst_is_marked(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"kind": KIND, "format": 1}]
    norms = {500: 5.0, 501: 40.0, 502: 8.0}
    lines += [{"step": i, "norm": norms.get(i, 1.0), "threshold": 1.0} for i in range(1, 5001)]
    (tmp_path / "run.jsonl").write_text("\n".join(map(json.dumps, lines)))
    marks = panels.marks_of(run_of(tmp_path / "run.jsonl"))
    assert max(marks, key=lambda mark: mark.y).step == 501


def test_columns_hold_what_read_records_returns(tmp_path: Path) -> None:
    """Resumed, out of order, repeated and sparse: the same steps and values."""
    choose = random.Random(0)
    header = {"kind": KIND, "format": 1}
    lines: list[dict[str, Any]] = [header]
    for i in [*range(1, 50), *range(30, 40), 38, 36, 38]:
        line = {"step": i, "norm": choose.random(), "groups": {"a": choose.random()}, "rank_norms": [choose.random()]}
        lines += [header] * (i == 30 and lines[-1].get("step") == 49) + [line | ({"valid": i} if i % 5 == 0 else {})]
    (tmp_path / "run.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records, data = read_records(tmp_path / "run.jsonl"), columns.read_columns(tmp_path / "run.jsonl")
    assert data.steps.tolist() == [step["step"] for step in records.steps] == list(range(1, 40))
    assert data.get("norm", 0).tolist() == [step["norm"] for step in records.steps]
    assert data.get("valid", -1).tolist() == [step.get("valid", -1) for step in records.steps]
    assert data.tables["groups"]["a"].values.tolist() == [step["groups"]["a"] for step in records.steps]
    assert data.tables["rank_norms"][0].values.tolist() == [step["rank_norms"][0] for step in records.steps]
    assert data.records == Records(headers=[header] * 2)


@pytest.mark.parametrize("scale", [1e-310, 1e-30, 1.0, 1e30, 1e305, 0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("steps", [1, 2, 1200])
def test_any_numbers_are_drawn(scale: float, steps: int, tmp_path: Path) -> None:
    choose = random.Random(0)
    lines: list[dict[str, Any]] = [{"kind": KIND, "format": 1}]
    for i in range(steps):
        numbers = [str(choose.random() * scale) if scale * 0 != 0 else choose.random() * scale for _ in range(4)]
        line = {"step": 7 * i, "norm": numbers[0], "threshold": numbers[1], "groups": {"a": numbers[2], "b": 1.0}}
        lines.append(line | {"loss": numbers[3], "odd": choose.choice([1, 1e300]), "rank_norms": numbers[:2]})
    (tmp_path / "run.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = run_of(tmp_path / "run.jsonl")
    assert "group norms: run" in svg(panels.panels_of([run]))
    assert len(summary([run])[1]) == len(summary([run])[0])
    assert len(events([run])[0]) >= 1


def test_many_names_and_many_starts_cost_little(tmp_path: Path) -> None:
    """A record whose names or runs have no end: the report is bounded, and says what it leaves out."""
    header = json.dumps({"kind": "distclip-record", "format": 1, "config": {"lr": 1.0}})
    lines = [json.dumps({"step": i, "norm": 1.0, f"value {i}": 1.0}) for i in range(3000)]
    (tmp_path / "names.jsonl").write_text("\n".join([header, *lines]) + "\n")
    starts = [f"{header}\n" + json.dumps({"step": i, "norm": 1.0}) for i in range(30000)]
    (tmp_path / "starts.jsonl").write_text("\n".join(starts) + "\n")
    page = page_of("names.jsonl", "starts.jsonl", folder=tmp_path)  # within the time limit of distclip()
    assert "names: 2,937 numbers are left out: there are too many names to draw" in page
    assert "how starts was started, the last 20 of 30,000 times" in page
    assert len(page) < 3_000_000
