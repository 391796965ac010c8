"""The lab is what it says: hosts of their own, real links, faults that strike and mend, and nothing left over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import wait_for_end

from cluster.lab import Lab

BYTES = 40_000_000  # of float32
SUM = """
import mlx.core as mx
import distclip

world = distclip.init()
total = mx.distributed.all_sum(mx.ones(10_000_000))
assert total[123].item() == world.size
print("summed")
"""
ANSWER = """
import socket, sys

with socket.create_server(("", 5000)) as server:
    print("listening", flush=True)
    for _ in range(int(sys.argv[1])):
        client, _ = server.accept()
        with client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while client.recv(1) == b"?":
                client.send(b"!")
            while client.recv(1 << 20):
                pass
            client.send(b".")
"""
ASK = """
import socket, sys, time

with socket.create_connection(("h2", 5000), timeout=20) as server:
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    taken = []
    for _ in range(200):
        begin = time.perf_counter()
        server.send(b"?")
        server.recv(1)
        taken.append(time.perf_counter() - begin)
    server.send(b".")
    begin, block, blocks = time.perf_counter(), bytes(1 << 20), int(sys.argv[1])
    for _ in range(blocks):
        server.sendall(block)
    server.shutdown(socket.SHUT_WR)
    server.recv(1)
    seconds = time.perf_counter() - begin
print(min(taken) * 1e3, blocks * len(block) / seconds / 1e6)
"""


def connects(lab: Lab, k: int, host: str, port: int) -> bool:
    command = ["timeout", "0.3", "bash", "-c", f"exec 3<>/dev/tcp/{host}/{port}"]
    return lab.on(k, command, limit_s=5).code == 0


def test_hosts_are_apart_and_reach_each_other_by_name_and_ssh(lab: Lab) -> None:
    command = "echo $(hostname) $(hostname -i) $HOME; echo mine > /tmp/$(hostname)"
    ask = f"for name in h1 h2 h3 h4; do ssh $name '{command}'; done"
    ended = lab.on(1, ["bash", "-c", ask], limit_s=15)
    assert ended.code == 0
    assert ended.output.splitlines() == [f"h{k} {lab.address(k)} /home/root" for k in (1, 2, 3, 4)]
    assert [lab.outside(k, f"/tmp/h{k}").read_text() for k in (1, 2, 3, 4)] == ["mine\n"] * 4
    assert not lab.outside(1, "/tmp/h2").exists()
    assert lab.left(grace_s=2) == []


def test_a_sum_over_hosts_crosses_the_links_and_on_one_host_does_not(lab: Lab) -> None:
    for hosts, least, most in (([], 1.0, 1.1), (["h1:4"], 0, 0.001)):
        before = [lab.bytes_sent(k) for k in (1, 2, 3, 4)]
        ended = lab.on(1, [*lab.mpirun(*hosts), sys.executable, "-c", SUM], limit_s=30)
        sent = [lab.bytes_sent(k) - old for k, old in zip((1, 2, 3, 4), before, strict=True)]
        assert ended.code == 0, ended.output
        assert ended.output.count("summed") == 4
        ring = 2 * 3 / 4 * BYTES
        assert all(least * ring <= count <= most * ring for count in sent), (hosts, sent)
        assert lab.left(grace_s=3) == []


def test_links_are_as_wide_and_as_long_as_they_say(lab: Lab) -> None:
    answer = lab.start(2, [sys.executable, "-c", ANSWER, "3"])
    answer.wait_for("listening", limit_s=5)
    measured = {}
    for link, blocks in (("unshaped", 100), ("10gbit", 200), ("1gbit", 50)):
        lab.shape(link)
        ended = lab.on(1, [sys.executable, "-c", ASK, str(blocks)], limit_s=20)
        assert ended.code == 0, ended.output
        measured[link] = [float(word) for word in ended.output.split()]
    assert answer.wait(limit_s=2).code == 0
    assert 0.32 < measured["1gbit"][0] < 0.8, measured  # ms there and back
    assert measured["unshaped"][0] < 0.2, measured
    assert 50 < measured["1gbit"][1] < 125, measured  # MB/s
    assert 125 < measured["10gbit"][1] < 1250, measured


@pytest.mark.parametrize("link", ["unshaped", "1gbit"])
def test_a_cut_link_carries_nothing_until_it_is_mended(lab: Lab, link: str) -> None:
    lab.shape(link)
    assert connects(lab, 1, "h2", 22)
    lab.cut(2)
    assert not connects(lab, 1, "h2", 22)
    assert not connects(lab, 2, "h1", 22)
    assert connects(lab, 1, "h3", 22)
    lab.mend(2)
    assert connects(lab, 1, "h2", 22)


def test_faults_of_a_host_strike_and_are_taken_back(lab: Lab) -> None:
    python, code = sys.executable, lab.shared / "code.py"
    code.write_text("print('one')")
    lab.start(2, [python, "-c", ANSWER, "9"]).wait_for("listening", limit_s=5)
    lab.block(2)
    assert not connects(lab, 1, "h2", 5000)
    assert connects(lab, 1, "h2", 22)
    assert connects(lab, 2, "h1", 22)
    lab.refuse_ssh(3)
    assert "refused" in lab.on(1, ["ssh", "h3", "true"], limit_s=5).output
    lab.freeze_ssh(4)
    assert "timed out" in lab.on(1, ["ssh", "-o", "ConnectTimeout=1", "h4", "true"], limit_s=5).output
    lab.hide(2, python)
    assert lab.on(2, [python, "-V"], limit_s=5).code == 127
    lab.replace(3, code, "print('two')")
    assert [lab.on(k, [python, str(code)], limit_s=5).output for k in (3, 4)] == ["two\n", "one\n"]
    lab.small_disk(4, "/tmp/small", "1M")
    assert "No space left" in lab.on(4, ["dd", "if=/dev/zero", "of=/tmp/small/file"], limit_s=5).output

    lab.reset()
    assert lab.processes() == []
    assert [lab.on(1, ["ssh", f"h{k}", python, "-V"], limit_s=5).code for k in (2, 3, 4)] == [0, 0, 0]
    assert list(lab.shared.iterdir()) == []
    assert "small" not in lab.on(4, ["ls", "/tmp"], limit_s=5).output


def test_a_host_that_was_stopped_goes_on_and_one_that_was_killed_boots(lab: Lab) -> None:
    count = lab.start(2, ["bash", "-c", "for i in {1..500}; do echo step $i; sleep 0.02; done"])
    count.wait_for("step 2\n", limit_s=5)
    lab.stop_host(2)
    shown = count.output
    time.sleep(0.1)
    assert count.output == shown
    lab.continue_host(2)
    count.wait_for(f"step {shown.count('step') + 2}\n", limit_s=5)
    lab.kill_host(2)
    assert count.wait(limit_s=2).code == 128 + signal.SIGKILL
    assert lab.processes() == []
    assert not connects(lab, 1, "h2", 22)
    lab.boot_host(2)
    assert connects(lab, 1, "h2", 22)


ABANDONED = """
import signal, sys, time
from cluster.lab import Lab

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background jobs
with Lab(2) as lab:
    lab.shape("1gbit")
    lab.start(1, ["sleep", "1000"])
    inits, keepers = (host.init for host in lab._hosts.values()), (keeper.pid for keeper in lab._keepers)
    print(lab.folder, *inits, *keepers, flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_a_lab_however_its_maker_ends(number: int, lab: Lab, tmp_path: Path) -> None:
    tests = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", ABANDONED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": tests}) as maker:
        assert maker.stdout is not None
        folder, *pids = maker.stdout.readline().split()
        assert len(pids) == 6
        maker.send_signal(number)
        maker.wait(10)
    assert wait_for_end([int(pid) for pid in pids], 5, is_running) == []
    assert folder not in Path("/proc/mounts").read_text()
    if number != signal.SIGINT:
        assert Path(folder).exists()  # which only the next lab can remove
    with Lab(1):
        assert not Path(folder).exists()
    assert lab.folder.exists()  # of this test's own lab, which lives on


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
