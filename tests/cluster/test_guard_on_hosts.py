"""On several hosts: what a rank started ends with it, a rank that does not join is named, and a bar moves."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time

import pytest

from cluster.lab import MPIRUN_ARGS, Lab, Running

WORKERS = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
import distclip as dc
import mlx.core as mx

def work(queue):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    queue.get()

world = dc.init()
queue = multiprocessing.get_context("fork").SimpleQueue()
for _ in range(2):
    multiprocessing.get_context("fork").Process(target=work, args=(queue,), daemon=True).start()
for step in range(1000):
    mx.eval(mx.distributed.all_sum(mx.ones(3), group=world.group))
    if world.rank == 0:
        print(f"step {step}", end="\\r", flush=True)
    time.sleep(0.1)
    if world.rank == 2 and step == 20 and "raise" in sys.argv:
        raise ValueError("broken data")
"""


def start(lab: Lab, program: str, *arguments: str, options: tuple[str, ...] = ()) -> Running:
    (lab.shared / "program.py").write_text(textwrap.dedent(program))
    line = [sys.executable, "-m", "distclip", "launch", "--hosts", "h1,h2,h3", "--cwd", str(lab.shared), *options]
    command = [*line, "--interface", lab.subnet, "program.py", *arguments]
    return lab.start(1, command, env={"MPIRUN_ARGS": MPIRUN_ARGS})


@pytest.mark.parametrize("end", ["raise", "kill -9 of a rank", "a host that is cut off", "kill -9 of the launcher"])
def test_workers_end_on_every_host(end: str, lab: Lab) -> None:
    job = start(lab, WORKERS, *(["raise"] if end == "raise" else []))
    job.wait_for("step 5", limit_s=40)
    if end == "kill -9 of a rank":
        lines = {process.pid: process.command.split() for process in lab.processes(3, "program.py")}
        os.kill(min(pid for pid, line in lines.items() if line[0].endswith("/python")), 9)  # workers came later
    elif end == "a host that is cut off":
        lab.cut(3)
    elif end == "kill -9 of the launcher":
        job.signal(9)
    ended = job.wait(limit_s=40)
    assert ended.code != 0
    until = time.monotonic() + 30 if end == "a host that is cut off" else time.monotonic() + 6
    while left := [process for k in (1, 2, 3) for process in lab.processes(k, "program.py")]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


def test_a_rank_that_does_not_join_is_named(lab: Lab) -> None:
    program = """
    import os, time
    import distclip as dc

    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        time.sleep(1000)
    dc.init(timeout=3)
    """
    ended = start(lab, program).wait(limit_s=40)
    assert ended.code != 0
    waited = r"rank \d of 3 on h\d has waited 3 s in init\(\) for other ranks; 1 of 1 on this host called it"
    assert re.search(waited, ended.output), ended.output
    assert "rank 1 on h2 did not call init()" in ended.output
    assert lab.left(grace_s=6) == []
