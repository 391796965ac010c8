"""``distclip launch`` keeps a Mac awake while its ranks run. A script plays macOS's caffeinate."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import SHARE_CORES, environment, launch, wait_for_end

from cluster.lab import MPIRUN_ARGS, Lab

pytestmark = pytest.mark.launches

# As macOS's: it runs until the process after -w has ended. No signal that mpirun ends ranks with ends it.
CAFFEINATE = """#!/bin/sh
trap '' TERM HUP INT
echo "$(uname -n) $$ $*" >> "$CALLS"
echo noise
echo noise >&2
while kill -0 "$4" && ! grep -q '^State:.Z' "/proc/$4/status"; do sleep 0.05; done 2> /dev/null
"""
# Each rank has no child, and waits until every rank is kept awake; then rank 1 ends as its argument says.
PROGRAM = """
import os, pathlib, signal, sys, time
try:
    os.waitpid(-1, os.WNOHANG)
    sys.exit("this rank has a child")
except ChildProcessError:
    pass
calls, began = pathlib.Path(os.environ["CALLS"]), time.monotonic()
while len(calls.read_text().splitlines()) < int(os.environ["OMPI_COMM_WORLD_SIZE"]):
    if time.monotonic() > began + 20:
        sys.exit("a rank is not kept awake")
    time.sleep(0.02)
assert f"-w {os.getpid()}\\n" in calls.read_text()
print("awake", flush=True)
if os.environ["OMPI_COMM_WORLD_RANK"] != "1" and len(sys.argv) > 1:
    time.sleep(100)
exec(sys.argv[1] if len(sys.argv) > 1 else "")
"""
ENDS = {  # what rank 1 does -> the exit code, and what the launcher says of it
    "": (0, ""),
    "sys.exit(3)": (3, "rank 1 on {} ended with exit code 3"),
    "os.kill(os.getpid(), signal.SIGKILL)": (137, "rank 1 on {} ended by SIGKILL"),
    "os.kill(os.getpid(), signal.SIGTERM)": (143, "rank 1 on {} ended by SIGTERM"),
}
LAUNCH = [sys.executable, "-m", "distclip", "launch"]


def prepare(folder: Path) -> dict[str, str]:
    """Make the program and a caffeinate; return the variables with which a host has it."""
    (folder / "program.py").write_text(PROGRAM)
    (folder / "calls").touch()
    (folder / "caffeinate").write_text(CAFFEINATE)
    (folder / "caffeinate").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}


def calls(folder: Path) -> list[list[str]]:
    """Of each caffeinate its host, its process and its arguments."""
    return [line.split() for line in (folder / "calls").read_text().splitlines()]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # a system without /proc, or it has just ended
        return sys.platform == "darwin"


@pytest.mark.parametrize("end", ENDS)
def test_a_mac_is_awake_until_its_ranks_end(end: str, tmp_path: Path) -> None:
    variables = prepare(tmp_path) | {"MPIRUN_ARGS": shlex.join(SHARE_CORES[4:])}
    code, message = ENDS[end]
    ended = launch([*LAUNCH, "--hosts", "localhost:2", "program.py", *filter(None, [end])], tmp_path, variables)
    assert ended.code == code, ended.output
    assert message.format(os.uname().nodename) in ended.output
    assert "noise" not in ended.output
    assert [words[2:5] for words in calls(tmp_path)] == [["-i", "-s", "-w"]] * 2
    assert not wait_for_end([int(words[1]) for words in calls(tmp_path)], 5, is_running)


def test_nothing_is_left_when_the_launcher_is_ended(tmp_path: Path) -> None:
    variables = prepare(tmp_path) | {"MPIRUN_ARGS": shlex.join(SHARE_CORES[4:])}
    command = [*LAUNCH, "--hosts", "localhost:2", "program.py", "time.sleep(100)"]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment() | variables, stdout=pipe, stderr=nothing, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    pids = [int(word) for words in calls(tmp_path) for word in (words[1], words[5])]  # caffeinate, and its rank
    before = wait_for_end(pids, 0, is_running)
    process.send_signal(signal.SIGTERM)
    code = process.wait(30)
    process.stdout.close()
    assert (sorted(lines), before, code) == (["[0] awake\n", "[1] awake\n"], pids, 128 + signal.SIGTERM)
    assert not wait_for_end(pids, 5, is_running)


def test_the_line_that_is_printed_keeps_it_awake_too(tmp_path: Path) -> None:
    variables = prepare(tmp_path) | {"MPIRUN_ARGS": shlex.join(SHARE_CORES[4:])}
    printed = launch([*LAUNCH, "--hosts", "localhost:2", "--dry-run", "program.py"], tmp_path, variables)
    assert calls(tmp_path) == []
    ended = launch(["sh", "-c", printed.output], tmp_path, variables)
    assert (ended.code, ended.output.count("awake\n")) == (0, 2), ended.output
    assert len(calls(tmp_path)) == 2


def test_each_host_is_kept_awake(lab: Lab) -> None:
    forwarded = [f"--env={name}={value}" for name, value in prepare(lab.shared).items()]
    hosts = str(lab.hosts_json(lab.shared / "hosts.json"))
    command = [*LAUNCH, "--hostfile", hosts, *forwarded, "program.py"]
    ended = lab.on(1, command, limit_s=60, env={"MPIRUN_ARGS": MPIRUN_ARGS})
    assert ended.code == 0, ended.output
    assert sorted(words[0] for words in calls(lab.shared)) == lab.hosts
    assert lab.left(grace_s=3) == []
