"""What ranks print, as a person sees it: bars that move, floods, and output that cannot be written."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from launching import SHARE_CORES, environment, launch

pytestmark = pytest.mark.launches

ROOT = Path(__file__).parents[1]
ARGS = {"NP": "2", "MPIRUN_ARGS": " ".join(SHARE_CORES[4:])}
LAUNCH = [sys.executable, "-m", "distclip", "launch", "--hosts", "localhost:2", "program.py"]
LAUNCHERS = {"local.sh": [str(ROOT / "launch/local.sh"), "program.py"], "launch": LAUNCH}
BEGIN = """
import os, sys, time
import distclip as dc
import mlx.core as mx
world = dc.init()
"""
BARS = {
    "a bar of its own": """
        for step in range(5):
            if world.rank == 0:
                sys.stderr.write(f"\\rstep {step}")
                sys.stderr.flush()
            time.sleep(0.5)
    """,
    "a live line": """
        with dc.Recorder(None, live=True, steps=5) as record:
            for step in range(5):
                record({"step": step, "norm": 1.0, "threshold": 1.0, "scale": 1.0, "finite": True})
                time.sleep(0.5)
    """,
}


def script(folder: Path, program: str) -> None:
    (folder / "program.py").write_text(BEGIN + textwrap.dedent(program))


def watched(command: list[str], folder: Path) -> tuple[int, list[tuple[float, bytes]]]:
    """Run a command on a terminal; the exit code, and what was shown, with the seconds since its start."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, cwd=folder, env=environment() | ARGS, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    began, shown = time.monotonic(), []
    while True:
        try:
            part = os.read(ours, 2**16)
        except OSError:  # Linux raises it when the other end closes
            break
        if not part:
            break
        shown.append((time.monotonic() - began, part))
    os.close(ours)
    return process.wait(60), shown


@pytest.mark.parametrize("bar", BARS)
@pytest.mark.parametrize("how", LAUNCHERS)
def test_a_bar_moves(how: str, bar: str, tmp_path: Path) -> None:
    script(tmp_path, BARS[bar])
    code, shown = watched(LAUNCHERS[how], tmp_path)
    whole = b"".join(part for _, part in shown).decode()
    assert code == 0, whole
    times = {step: next(at for at, part in shown if f"step {step}".encode() in part) for step in range(1, 4)}
    assert times[3] - times[1] > 0.6, (times, whole)
    if how == "launch":
        assert "\r[0] " in whole


FLOODS = {
    "a bar": "for i in range(80_000):\n    os.write(2, b'\\rstep %d' % i)",
    "one line": "os.write(1, b'x' * 8_000_000 + b'\\n')",
    "lines": "for i in range(100_000):\n    os.write(1, b'line %d\\n' % i)",
}


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("how", LAUNCHERS)
def test_a_flood_costs_little_and_ends_nothing(how: str, flood: str, tmp_path: Path) -> None:
    script(tmp_path, FLOODS[flood])
    began = time.monotonic()
    ended = launch(LAUNCHERS[how], tmp_path, ARGS)
    assert ended.code == 0, ended.output[-2000:]
    assert time.monotonic() - began < 30
    expected = {"a bar": ("step 79999", 2), "one line": ("x", 16_000_000), "lines": ("line 99999\n", 2)}[flood]
    assert ended.output.count(expected[0]) in (expected[1], expected[1] + 2)  # a path may have an x


# ------------------------------------------------------------------------------------ output that cannot be written

SPEAKS = """
print("one \\u2192 two", flush=True)
mx.eval(mx.distributed.all_sum(mx.ones(3), group=world.group))
time.sleep(0.5)
print("later", flush=True)
mx.eval(mx.distributed.all_sum(mx.ones(3), group=world.group))
open(f"done-{world.rank}", "w").close()
"""


@pytest.mark.parametrize("which", ["a full disk", "a closed pipe", "closed"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_cannot_be_written_ends_nothing(stream: str, which: str, tmp_path: Path) -> None:
    if which == "a full disk" and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    script(tmp_path, SPEAKS if stream == "stdout" else SPEAKS.replace("flush=True", "flush=True, file=sys.stderr"))
    number = 1 if stream == "stdout" else 2
    where = {"a full disk": f"{number}>/dev/full", "closed": f"{number}>&-", "a closed pipe": ""}[which]
    command = ["sh", "-c", f'"$@" {where}', "sh", *LAUNCH]
    if which == "a closed pipe":
        ours, theirs = os.pipe()
        os.close(ours)
    else:
        theirs = -1
    try:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | ({stream: theirs} if theirs >= 0 else {})
        ended = subprocess.run(command, cwd=tmp_path, env=environment() | ARGS, timeout=60, **pipes)  # type: ignore[call-overload]
    finally:
        if theirs >= 0:
            os.close(theirs)
    other = (ended.stderr if stream == "stdout" else ended.stdout) or b""
    assert ended.returncode == 0, other
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
    name = "standard output" if stream == "stdout" else "standard error"
    assert other.decode().count(f"distclip: {name} cannot be written (") == (which != "closed"), other


def test_an_ascii_terminal(tmp_path: Path) -> None:
    script(tmp_path, "os.write(1, 'an arrow \u2192\\n'.encode())")
    ended = launch(LAUNCH, tmp_path, ARGS | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert ended.code == 0, ended.output
    assert ended.output.count("an arrow \\u2192\n") == 2


COMMANDS = {
    "doctor": ["doctor", "--python", "/n\u00f6where/python"],
    "doctor --json": ["doctor", "--python", "/n\u00f6where/python", "--json", "-"],
    "launch --dry-run": ["launch", "--hosts", "localhost", "--dry-run", "program\u2192.py"],
}


@pytest.mark.parametrize("where", [">/dev/full", ">&-", "2>&-", "| true", ""])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_ends_in_a_traceback(command: str, where: str, tmp_path: Path) -> None:
    line = ["sh", "-c", f'"$@" {where}', "sh", sys.executable, "-m", "distclip", *COMMANDS[command]]
    ended = launch(line, tmp_path, {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert "Traceback" not in ended.output
    assert "Error" not in ended.output
    assert (where == "") <= ("\\" in ended.output)


def test_a_json_file_that_cannot_be_written(tmp_path: Path) -> None:
    ended = launch([sys.executable, "-m", "distclip", "doctor", "--json", "/nowhere/x.json"], tmp_path)
    assert ended.code == 2
    assert "--json /nowhere/x.json cannot be written (No such file or directory)" in ended.output
    assert "Traceback" not in ended.output
