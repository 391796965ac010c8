"""Faults in a run of launch/train.py on four hosts: each ends within its bound and is named, and the run can go on.

Bounds are in seconds from the fault to the end of launch/cluster.sh, with its default settings. Checkpoints lie on
disks that the hosts do not share. A run that was hurt and resumed ends in the same bits as one that never was.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import distclip as dc
from cluster.lab import HOME, MPIRUN_ARGS, ROOT, Lab, Running

FOLDER = f"{HOME}/run"  # each host has its own
STEPS, EVERY = 66, 6
SMALL = ["--context=64", "--batch-size=16", "--warm-up=5", "--valid-every=1000", "--valid-batches=1", "--layers=1"]
SMALL += [f"--steps={STEPS}", f"--checkpoint-every={EVERY}", "--log-every=1", f"--checkpoint={FOLDER}"]
START_LIMIT_S = 40
RUN_LIMIT_S = 90


def start(lab: Lab, *more: str, parallel: str = "fsdp", options: tuple[str, ...] = ()) -> Running:
    hosts = str(lab.hosts_json(lab.shared / "hosts.json"))
    command = [str(ROOT / "launch/cluster.sh"), "--hostfile", hosts, *options, str(ROOT / "launch/train.py")]
    return lab.start(1, [*command, f"--parallel={parallel}", *SMALL, *more], env={"MPIRUN_ARGS": MPIRUN_ARGS})


def last_checkpoint(lab: Lab) -> dict[str, Any]:
    """The arrays of the last checkpoint, whichever host has them."""
    arrays: dict[str, Any] = {}
    folders = [*(lab.outside(k, FOLDER) for k in range(1, 5)), lab.shared / "run"]
    for path in [path for folder in folders for path in folder.glob(f"step-{STEPS:08d}/shard-*.safetensors")]:
        loaded: Any = mx.load(str(path))
        arrays |= {f"{path.name} {name}": array for name, array in loaded.items()}
    mx.eval(arrays)
    return arrays


@pytest.fixture(scope="module")
def never_hurt(lab: Lab) -> dict[str, Any]:
    lab.reset()
    ended = start(lab).wait(limit_s=RUN_LIMIT_S)
    assert ended.code == 0, ended.output
    arrays = last_checkpoint(lab)
    assert {name.split()[0] for name in arrays} == {f"shard-{k}.safetensors" for k in range(4)}
    lab.reset()
    return arrays


def assert_same(arrays: dict[str, Any], never_hurt: dict[str, Any]) -> None:
    assert arrays.keys() == never_hurt.keys()
    assert all(mx.array_equal(arrays[name], never_hurt[name], equal_nan=True).item() for name in arrays)


def newest(lab: Lab) -> int:
    """The newest step of which every host has its part."""
    steps = [[int(path.name[5:]) for path in lab.outside(k, FOLDER).glob("step-*")] for k in range(1, 5)]
    return min(max(host_steps, default=0) for host_steps in steps)


def rank(lab: Lab, k: int) -> int:
    """The process of the rank on host k."""
    words = ((process.pid, process.command.split()) for process in lab.processes(k, "train.py"))
    (rank_pid,) = [pid for pid, line in words if line[0].endswith("/python") and line[1].endswith("train.py")]
    return rank_pid


# ------------------------------------------------------------------------------------------- faults of a run


@dataclass(frozen=True)
class Fault:
    strike: Callable[[Lab], None]
    bound_s: float
    message: str | None  # None: there is nobody left to say it
    heal: Callable[[Lab], None] = Lab.clear
    options: tuple[str, ...] = ()


def boot(k: int) -> Callable[[Lab], None]:
    def heal(lab: Lab) -> None:
        lab.boot_host(k)
        lab.mend(k)

    return heal


FAULTS = {
    "an exception on a rank": Fault(
        lambda lab: os.kill(rank(lab, 3), signal.SIGINT), 10, "rank 2 of 4 on h3 failed with KeyboardInterrupt"
    ),
    "kill -9 of a rank": Fault(lambda lab: os.kill(rank(lab, 3), signal.SIGKILL), 10, "rank 2 on h3 ended by SIGKILL"),
    "kill -9 of rank 0": Fault(lambda lab: os.kill(rank(lab, 1), signal.SIGKILL), 10, "rank 0 on h1 ended by SIGKILL"),
    "a rank that is stopped": Fault(
        lambda lab: os.kill(rank(lab, 2), signal.SIGSTOP),
        13,  # 3 of them the watchdog's time
        "rank 1 on h2 did not report when the watchdogs of the others did",
        options=("--watchdog=3",),
    ),
    "a host that is stopped": Fault(
        lambda lab: lab.stop_host(4), 30, "host h4 does not answer", lambda lab: lab.continue_host(4)
    ),
    "a link that is cut": Fault(lambda lab: lab.cut(3), 30, "host h3 does not answer", lambda lab: lab.mend(3)),
    "a host without power": Fault(lambda lab: lab.kill_host(2), 30, "host h2 does not answer", boot(2)),
    "mpirun's own host without power": Fault(lambda lab: lab.kill_host(1), 30, None, boot(1)),
}


@pytest.mark.time_limit(400)
def test_a_run_that_is_hurt_by_every_fault_and_resumed_ends_in_the_same_bits(
    lab: Lab, never_hurt: dict[str, Any]
) -> None:
    """Each fault ends the job in its time, with a message and an exit code, and costs no more than the last steps."""
    first: tuple[str, ...] = ()
    for what, fault in FAULTS.items():
        done = newest(lab)
        job = start(lab, *first, *fault.options)
        output = job.wait_for(f"step {done + EVERY + 2}/", limit_s=START_LIMIT_S)
        assert f"[0] step {done + 1}/{STEPS} " in output, f"{what}: {output}"
        began = time.time()
        fault.strike(lab)
        if fault.message is None:
            while lab.processes(containing="train.py") and time.time() - began < fault.bound_s:
                time.sleep(0.1)
            ended_at = time.time()
        else:
            ended = job.wait(limit_s=fault.bound_s + 30)
            ended_at = ended.at
            assert ended.code != 0, f"{what}: {ended.output}"
            assert fault.message in ended.output, f"{what}: {ended.output}"
            assert f"the job failed (exit code {ended.code})" in ended.output, f"{what}: {ended.output}"
        print(f"{what}: ended after {ended_at - began:.1f} s")
        assert ended_at - began < fault.bound_s, what
        fault.heal(lab)
        if fault.heal is not Lab.clear:
            lab.clear()
        assert newest(lab) >= done + EVERY
        first = ("--resume",)
    done = newest(lab)
    ended = start(lab, "--resume").wait(limit_s=RUN_LIMIT_S)
    assert ended.code == 0, ended.output
    assert f"[0] step {done + 1}/{STEPS} " in ended.output
    assert_same(last_checkpoint(lab), never_hurt)


def lose_power(lab: Lab, job: Running, k: int) -> None:
    """Kill host k, see the run end on the others, and boot the host again."""
    lab.kill_host(k)
    until = time.monotonic() + START_LIMIT_S
    while any(lab.processes(host, "train.py") for host in range(1, 5) if host != k):
        assert time.monotonic() < until, f"h{k} was killed: {job.output}"
        time.sleep(0.1)
    if k != 1:
        ended = job.wait(limit_s=START_LIMIT_S)
        assert ended.code != 0, f"h{k} was killed: {ended.output}"
    boot(k)(lab)
    lab.clear()


HOSTS_KILLED = int(os.environ.get("DISTCLIP_TEST_HOSTS_KILLED", "0"))


@pytest.mark.skipif(HOSTS_KILLED == 0, reason="DISTCLIP_TEST_HOSTS_KILLED says how many hosts lose power")
@pytest.mark.time_limit(60 + 100 * HOSTS_KILLED)
def test_hosts_that_lose_power_at_random_moments_cost_no_bits(lab: Lab, never_hurt: dict[str, Any]) -> None:
    seed = int.from_bytes(os.urandom(3), "big")
    choose, killed = random.Random(seed), 0
    while killed < HOSTS_KILLED:
        for k in range(1, 5):
            shutil.rmtree(lab.outside(k, FOLDER), ignore_errors=True)
        job, went_on = start(lab, "--resume"), False
        while killed < HOSTS_KILLED and not went_on:
            k, until = choose.randint(1, 4), time.monotonic() + choose.uniform(0, 20)
            while job.code is None and time.monotonic() < until:
                time.sleep(0.02)
            went_on = job.code is not None
            if not went_on:
                killed += 1
                lose_power(lab, job, k)
                job = start(lab, "--resume")
        ended = job.wait(limit_s=RUN_LIMIT_S)
        assert ended.code == 0, f"seed {seed}: after {killed} kills: {ended.output}"
        assert_same(last_checkpoint(lab), never_hurt)
    print(f"seed {seed}: {killed} hosts lost power")


def test_a_link_that_is_cut_and_healed_costs_nothing(lab: Lab, never_hurt: dict[str, Any]) -> None:
    job = start(lab)
    job.wait_for(f"step {EVERY + 2}/", limit_s=START_LIMIT_S)
    lab.cut(3)
    time.sleep(5)
    assert job.code is None
    lab.mend(3)
    ended = job.wait(limit_s=RUN_LIMIT_S)
    assert ended.code == 0, ended.output
    assert_same(last_checkpoint(lab), never_hurt)


def test_a_full_disk_leaves_the_checkpoints_before_it_whole(lab: Lab, never_hurt: dict[str, Any]) -> None:
    lab.small_disk(3, FOLDER, "3M")
    job = start(lab)
    job.wait_for(f"step {EVERY + 2}/", limit_s=START_LIMIT_S)
    lab.on(3, ["sh", "-c", f"cat /dev/zero >{FOLDER}/filler"], limit_s=10)
    began = time.time()
    ended = job.wait(limit_s=40)
    assert ended.at - began < 15
    assert ended.code != 0, ended.output
    assert "rank 2 of 4 on h3" in ended.output
    assert FOLDER in ended.output
    lab.on(3, ["rm", f"{FOLDER}/filler"], limit_s=10)
    ended = start(lab, "--resume").wait(limit_s=RUN_LIMIT_S)
    assert ended.code == 0, ended.output
    lab.on(3, ["cp", "-r", FOLDER, str(lab.shared / "run")], limit_s=10)
    assert_same(last_checkpoint(lab), never_hurt)


def test_a_failed_run_is_started_again_by_itself(lab: Lab, never_hurt: dict[str, Any]) -> None:
    """The host comes back while the launcher waits for it."""
    job = start(lab, options=("--restarts", "1"))
    job.wait_for(f"step {EVERY + 2}/", limit_s=START_LIMIT_S)
    lab.refuse_ssh(4)
    os.kill(rank(lab, 4), signal.SIGKILL)
    job.wait_for("starting again with --resume", limit_s=30)
    time.sleep(2)
    lab.accept_ssh(4)
    ended = job.wait(limit_s=RUN_LIMIT_S)
    assert ended.code == 0, ended.output
    assert_same(last_checkpoint(lab), never_hurt)


# ---------------------------------------------------------------------------------------- faults at the launch


def test_what_would_stop_a_launch_is_said_before_it(lab: Lab, never_hurt: dict[str, Any]) -> None:
    import mlx

    metadata = next(Path(mlx.__path__[0]).parent.glob("mlx-[0-9]*.dist-info/METADATA"))
    text = metadata.read_text()
    lab.refuse_ssh(2)
    lab.hide(3, Path(sys.prefix) / "bin/python")
    lab.replace(4, metadata, re.sub(r"^Version: .*$", "Version: 0.31.0", text, count=1, flags=re.MULTILINE))
    began = time.time()
    ended = start(lab).wait(limit_s=40)
    print(f"three faults: printed after {ended.at - began:.1f} s")
    assert ended.at - began < 20
    assert ended.code != 0
    assert "step" not in ended.output
    lines = {host: [line for line in ended.output.splitlines() if f"distclip: {host}: " in line] for host in lab.hosts}
    assert "Connection refused" in " ".join(lines["h2"]), ended.output
    assert str(Path(sys.prefix) / "bin/python") in " ".join(lines["h3"]), ended.output
    assert "0.31.0" in " ".join(lines["h4"]), ended.output
    lab.reset()

    lab.replace(3, ROOT / "launch/train.py", "print('another script')\n")
    (lab.shared / "hosts.json").write_text('[{"ssh": "h1"}, {"ssh": "h3"}, {"ssh": "nowhere"}]')
    command = [str(ROOT / "launch/cluster.sh"), "--hostfile", str(lab.shared / "hosts.json")]
    ended = lab.on(1, command, limit_s=40)
    assert ended.code != 0
    assert "nowhere" in ended.output
    assert "another script" not in ended.output
    assert re.search(r"^distclip: h3: .*train\.py", ended.output, re.MULTILINE), ended.output


# ----------------------------------------------------------------------------------------------- no fault at all


@pytest.mark.parametrize("parallel", ["dp", "tp", "fsdp"])
def test_four_hosts_make_the_run_of_one_host(parallel: str, lab: Lab) -> None:
    runs: list[list[tuple[float, float]]] = []
    for hosts in ("h1,h2,h3,h4", "h1:4"):
        record = lab.shared / f"{parallel}-{len(runs)}.jsonl"
        command = [str(ROOT / "launch/cluster.sh"), "--hosts", hosts, "--interface", lab.subnet]
        command += [str(ROOT / "launch/train.py"), f"--parallel={parallel}", *SMALL, "--steps=12", f"--record={record}"]
        before = [lab.bytes_sent(k) for k in range(1, 5)]
        ended = lab.on(1, command, limit_s=RUN_LIMIT_S, env={"MPIRUN_ARGS": MPIRUN_ARGS})
        assert ended.code == 0, ended.output
        sent = [lab.bytes_sent(k) - before[k - 1] for k in range(1, 5)]
        if not runs:  # twelve gradients of more than 300 kB crossed each link
            assert min(sent) > 12 * 300_000, sent
        runs.append([(step["loss"], step["norm"]) for step in dc.read_records(record).steps])
    assert len(runs[0]) == len(runs[1]) == 12
    for on_four, on_one in zip(*runs, strict=True):
        assert on_four == pytest.approx(on_one, rel=1e-5)
