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
import time
from pathlib import Path
from typing import Any

import pytest

from distclip.records import report
from distclip.records.page import ticks
from distclip.records.read import KIND, Records, read_records

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


def cells(page: str) -> list[list[str]]:
    return [
        [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", page)
    ]


# ------------------------------------------------------------------------------------------------- in a browser


def browse(page: Path, *options: str) -> str:
    """The page's document after its script has run."""
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
    write(tmp_path / "<script>throw 1<.jsonl".replace("/", ""), 200, seed=1)
    page_of("first.jsonl", "<script>throw 1<.jsonl", folder=tmp_path)
    shown = browse(tmp_path / "report.html", "--dump-dom")
    assert "data-error" not in shown
    panels = re.findall(r"<figure.*?</figure>", shown, re.DOTALL)
    titles = [re.findall(r"<h2>(.*?)</h2>", panel)[0] for panel in panels]
    assert f'data-ready="{len(panels)}"' in shown
    strange = "&lt;script&gt;throw 1&lt;"
    assert titles == [
        "loss, valid",
        "gradient norm before clipping, and threshold",
        "clipped and skipped, % of 50 recorded steps",
        *(
            "group norms: first",
            "norms of the ranks: first",
            f"group norms: {strange}",
            f"norms of the ranks: {strange}",
        ),
        "gradient noise scale (rows of a batch; where above 0)",
        "time of a step (s)",
    ]
    assert [panel.count('class="line"') for panel in panels] == [4, 4, 3, 0, 0, 0, 0, 2, 2]
    assert [panel.count("<image") for panel in panels] == [0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert "step 100, first: norm nan, skipped (rank 2 on mac-b)" in panels[1]
    assert re.search(r"step 200, first: \d+\.?\d* x the threshold \(rank 2 on mac-b\)", panels[1])


def test_the_values_below_the_pointer_are_shown(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 200, bad=(100,))
    page = page_of("run.jsonl", folder=tmp_path)
    script = """<script>
    const told = [];
    document.querySelectorAll("figure > svg").forEach(svg => {
        const edge = svg.getBoundingClientRect();
        const at = { clientX: edge.left + edge.width * (150 + 798 * 99.2 / 199) / 960, clientY: edge.top + 12 };
        svg.dispatchEvent(new PointerEvent("pointermove", at));
        told.push(document.getElementById("tip").textContent);
        svg.dispatchEvent(new PointerEvent("pointerleave"));
    });
    document.documentElement.dataset.told = JSON.stringify(told);
    </script>"""
    (tmp_path / "report.html").write_text(page.replace("</body>", script + "</body>"))
    shown = browse(tmp_path / "report.html", "--dump-dom")
    assert "data-error" not in shown
    told = json.loads(html.unescape(re.findall(r'data-told="(.*?)"', shown)[0]))
    steps = {step["step"]: step for step in read_records(tmp_path / "run.jsonl").steps}
    assert told[0].split("\n")[0] == f"step 100  run: loss: {steps[100]['loss']:.4g}"
    assert told[1].split("\n") == ["step 100  run: norm: nan", "step 100  run: threshold: 1"]
    assert told[3] == "step 100\nattention: nan"
    assert told[4] == "step 100\nrank 0 on mac-a: 1"


def test_the_page_is_drawn_and_needs_no_network(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 100)
    page = page_of("run.jsonl", folder=tmp_path)
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+|\ssrc=|@import|<link", page)
    browse(tmp_path / "report.html", f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1000,900")
    assert (tmp_path / "shot.png").stat().st_size > 20_000


# ------------------------------------------------------------------------------------------------ what it says


def test_the_table_counts_what_the_record_has(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 100, bad=(10, 11), spikes=(50,))
    heads, row = cells(page_of("run.jsonl", folder=tmp_path))
    said = dict(zip(heads, row, strict=True))
    steps = read_records(tmp_path / "run.jsonl").steps
    assert said["steps"] == "100 (1 to 100)"
    assert said["clipped"] == f"{sum(step['clipped'] for step in steps):.1f}%"
    assert (said["skipped"], said["not finite"]) == ("2", "2")
    assert said["worst norm"] == f"{steps[49]['norm']:.4g} at step 50"
    assert said["median step"] == "10 ms"
    assert said["ranks to look at"] == "rank 2 on mac-b: 3 steps"


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "run.jsonl", 10)
    _, *rows = cells(page_of("a/run.jsonl", "b/run.jsonl", folder=tmp_path))
    assert [row[0] for row in rows] == ["a/run.jsonl", "b/run.jsonl"]


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
    assert page.count("<script") == page.count("</script") == 2
    shown = browse(tmp_path / "report.html", "--dump-dom")
    assert "data-error" not in shown
    assert "<title>Gradient clipping: run</title>" in shown


def test_a_threshold_for_each_group_is_drawn_too(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"kind": KIND, "format": 1}]
    for i in range(1, 60):
        scale = 0.1 if i == 30 else 1.0
        lines.append({"step": i, "norm": 1.0, "threshold": {"a": 1, "b": 2}, "scale": {"a": scale, "b": 1.0}})
    (tmp_path / "run.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = page_of("run.jsonl", folder=tmp_path)
    assert "step 30, run: 10 x the threshold" in page
    assert page.count("x the threshold") == 1


def test_a_damaged_record_gives_a_report_of_what_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 50)
    lines = (tmp_path / "run.jsonl").read_text().splitlines(keepends=True)
    lines[20:22] = ["{{{\n", "\x00\x01\n"]
    lines.insert(30, json.dumps({"kind": "dropped", "steps": 7}) + "\n")
    (tmp_path / "run.jsonl").write_text("".join(lines)[:-10])
    ended = distclip("run.jsonl", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "the report is in run.html" in ended.stdout
    said = [
        "run: damaged lines are left out: line 21 (not JSON), 22 (not JSON), 52 (cut off)",
        "run: 7 steps could not be written when they were recorded",
    ]
    assert ended.stderr.splitlines() == said
    page = (tmp_path / "run.html").read_text()
    assert all(text in page for text in said)
    assert cells(page)[1][1] == "47 (1 to 49)"
    assert cells(page)[1][8] == "7 dropped, 1 gaps, 3 damaged lines"


def test_a_run_without_steps_has_a_page_that_says_so(tmp_path: Path) -> None:
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
def test_what_is_no_record_gets_one_clear_error(data: bytes | None, message: str, tmp_path: Path) -> None:
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
def test_a_report_that_cannot_be_written_is_told_first(options: tuple[str, str], message: str, tmp_path: Path) -> None:
    write(tmp_path / "run.jsonl", 5)
    before = (tmp_path / "run.jsonl").read_bytes()
    ended = distclip("run.jsonl", *options, folder=tmp_path)
    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]
    assert (tmp_path / "run.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------------------------- the drawing


def test_a_picture_of_several_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no picture is drawn")
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


def test_100_000_steps_are_drawn_in_seconds_and_no_spike_is_lost(tmp_path: Path) -> None:
    spikes = tuple(range(777, 100_000, 5_003))
    write(tmp_path / "run.jsonl", 100_000, spikes=spikes, bad=(12_345,))
    started = time.perf_counter()
    page = page_of("run.jsonl", folder=tmp_path)
    assert time.perf_counter() - started < 20
    assert len(page) < 2_000_000
    data = json.loads(re.findall(r'id="panels">(.*?)</script>', page)[0])
    _, steps, norms = data[1]["lines"][0]
    drawn = dict(zip(steps, norms, strict=True))
    assert all(drawn[step] > 20 for step in spikes)
    assert drawn[12_345] == "nan"
    assert len(drawn) < 2_000
    assert all(f"step {step:,}, run: " in page for step in (*spikes, 12_345))
    assert max(value for value in data[3]["cells"][0] if value != "nan") > 10
    assert data[3]["cells"][0].count("nan") == 1


def test_thinning_keeps_the_ends_of_the_scale_of_each_column() -> None:
    choose = random.Random(0)
    points = [(i, choose.choice([choose.random(), math.nan, math.inf])) for i in range(20_011)]
    xs, ys = report.thinned(points)
    assert xs == sorted(xs)
    assert len(xs) <= 3 * report.COLUMNS
    finite = [y for _, y in points if math.isfinite(y)]
    kept = [y for y in ys if math.isfinite(y)]
    assert (min(kept), max(kept)) == (min(finite), max(finite))
    assert any(math.isnan(y) for y in ys)
    assert report.thinned(points[:600])[0] == list(range(600))


def test_ticks_are_few_round_and_inside() -> None:
    choose = random.Random(0)
    for _ in range(3_000):
        low = 10 ** choose.uniform(-30, 30)
        high = low * (1 + 10 ** choose.uniform(-6, 12))
        for log in (False, True):
            found = ticks(low, high, log)
            assert 1 <= len(found) <= 14, (low, high, log)
            assert all(low * (1 - 1e-9) <= value <= high * (1 + 1e-9) for value in found)
            assert found == sorted(set(found)), (low, high, log)


def test_of_several_spikes_in_a_column_the_worst_is_marked() -> None:
    steps = [{"step": i, "norm": {500: 5.0, 501: 40.0, 502: 8.0}.get(i, 1.0), "threshold": 1.0} for i in range(1, 5001)]
    marks = report.spikes(report.Run("a", Records(steps), 0))
    assert max(marks, key=lambda mark: mark.y).step == 501
    assert all("x the threshold" in mark.text for mark in marks)
