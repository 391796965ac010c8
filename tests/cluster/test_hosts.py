"""From hosts to the mpirun line: what is read, what is refused, and that nothing in it can become a command."""

from __future__ import annotations

import argparse
import ipaddress
import itertools
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from distclip.cluster.hosts import (
    Cluster,
    Host,
    Job,
    add_host_arguments,
    job_of,
    network,
    parse_hosts,
    read_hostfile,
)
from distclip.cluster.mpirun import mpirun_line, ranks_by_host, ssh_line

MLX_HOSTS = [{"ssh": "mac1", "ips": ["10.0.0.1"], "rdma": [None]}, {"ssh": "me@mac2.local", "ips": ["10.0.0.2"]}]


def job(*options: str) -> Job:
    parser = argparse.ArgumentParser()
    add_host_arguments(parser)
    return job_of(parser.parse_args(options))


def write(folder: Path, text: str) -> Path:
    (folder / "hosts").write_text(text)
    return folder / "hosts"


# ------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("form", ["list", "dictionary"])
def test_mlx_hosts_json(form: str, tmp_path: Path) -> None:
    envs = ["MLX_METAL_FAST_SYNCH=1"]
    content = MLX_HOSTS if form == "list" else {"backend": "ring", "envs": envs, "hosts": MLX_HOSTS}
    cluster = read_hostfile(write(tmp_path, json.dumps(content)))
    assert cluster.hosts == (Host("mac1", ("10.0.0.1",)), Host("me@mac2.local", ("10.0.0.2",)))
    assert cluster.env == (() if form == "list" else tuple(envs))


def test_what_mlx_itself_writes_is_read(tmp_path: Path) -> None:
    from mlx._distributed_utils.common import Hostfile

    theirs = Hostfile.from_list("10.0.0.1,10.0.0.2", repeats=2)
    cluster = read_hostfile(write(tmp_path, json.dumps(theirs.to_json(), indent=4)))
    assert cluster.hosts == (Host("10.0.0.1", ("10.0.0.1",), 2), Host("10.0.0.2", ("10.0.0.2",), 2))


def test_an_open_mpi_hostfile(tmp_path: Path) -> None:
    text = "# our hosts\nmac1 slots=2 max_slots=4\n\nmac2   # the other\nmac3 slots=1\nmac2\n"
    hosts = read_hostfile(write(tmp_path, text)).hosts
    assert [(host.name, host.slots) for host in hosts] == [("mac1", 2), ("mac2", 2), ("mac3", 1)]


def test_hosts_by_name() -> None:
    hosts = parse_hosts("mac1, me@mac2:2,192.168.0.7").hosts
    assert hosts == (Host("mac1"), Host("me@mac2", (), 2), Host("192.168.0.7", ("192.168.0.7",)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it lists no hosts"),
        ("{}", "MLX's form is a list of hosts"),
        ("[1]", "MLX's form is a list of hosts"),
        ('[{"ssh": "a"', "it is not JSON"),
        ('[{"ssh": "a", "ips": ["10.0.0"]}]', "'10.0.0' in ips is not an IPv4 address"),
        ('{"envs": ["NAME"], "hosts": [{"ssh": "a"}]}', "'NAME' is not NAME=VALUE"),
        ("mac1 slots=many", "line 1: slots=many is not a number of ranks"),
        ("mac1 slots=0", "host mac1 has 0 ranks"),
        ("-oProxyCommand=evil", "'-oProxyCommand=evil' is not a host"),
        ('[{"ssh": "a;reboot"}]', "'a;reboot' is not a host"),
        ('[{"ssh": "$(reboot)"}]', "is not a host"),
        ('[{"ssh": "a b"}]', "is not a host"),
        ('[{"ssh": "a\\nb"}]', "is not a host"),
        ('[{"ssh": "me@-oX"}]', "is not a host"),
    ],
)
def test_a_hosts_file_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hosts: ") as error:
        read_hostfile(write(tmp_path, text))
    assert message in str(error.value)


def test_a_missing_hosts_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the hosts file .*nowhere cannot be read"):
        read_hostfile(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name the hosts: --hostfile hosts.json or --hosts a,b"),
        (("--hosts", "a,,b"), "'' is not a host"),
        (("--hosts", "a:x"), "the number of ranks follows the colon"),
        (("--hosts", "a:0"), "host a has 0 ranks"),
        (("--hosts", "a,b", "-n", "3"), "-n 3: the hosts have 2 slots"),
        (("--hosts", "a,b", "-n", "0"), "-n 0: the hosts have 2 slots"),
        (("--hosts", "a", "--interface", "en5;reboot"), "is neither an interface"),
        (("--hosts", "a", "--interface", "en5,10.0.0.0/33"), "'10.0.0.0/33' is neither"),
        (("--hosts", "a", "--interface=--x"), "is neither an interface"),
        (("--hosts", "a", "--env", "NOT_SET_HERE"), "--env NOT_SET_HERE: it is not set here"),
        (("--hosts", "a", "--env", "A B=1"), "is not NAME=VALUE"),
        (("--hosts", "a", "--python", "python3"), "--python python3: give the full path"),
        (("--hosts", "a", "--cwd", "runs"), "--cwd runs: give the full path"),
        (("--hosts", "10.0.0.1,192.168.0.1"), "have no common network: select one with --interface"),
    ],
)
def test_a_bad_option_gets_one_error(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        job(*options)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------- the network


def test_the_network_has_every_address_and_is_the_smallest() -> None:
    assert network(parse_hosts("10.0.0.1,10.0.0.2")) == "10.0.0.0/30"
    assert network(parse_hosts("10.0.0.1,10.0.0.2,10.0.0.4")) == "10.0.0.0/29"
    assert network(parse_hosts("192.168.1.7:4")) is None
    assert network(parse_hosts("10.0.0.1,mac2")) is None
    for first, second in itertools.combinations(range(1, 70), 2):
        smallest = network(parse_hosts(f"10.1.2.{first},10.1.2.{second}"))
        assert smallest is not None
        covering = ipaddress.ip_network(smallest)
        both = [ipaddress.ip_address(f"10.1.2.{k}") for k in (first, second)]
        assert all(address in covering for address in both)
        assert not any(all(address in half for address in both) for half in covering.subnets())


def test_ranks_fill_the_hosts_in_their_order() -> None:
    where = ranks_by_host(job("--hosts", "a:2,b:2,c", "-n", "3"))
    assert where == {"a": {0, 1}, "b": {2}, "c": set()}


# --------------------------------------------------------------------------------------------------- the lines


def test_the_line_says_where_over_what_and_how_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("DISTCLIP_RANK_PROCESS", "of another job")
    monkeypatch.setenv("SECRET", "of this host")
    monkeypatch.setenv("MPIRUN_ARGS", "--mca btl 'tcp,self'")
    cluster = Cluster((Host("mac1", ("10.0.0.1",), 2), Host("mac2", ("10.0.0.2",))), ("A=1", "B=2"))
    run = Job(cluster, 3, "/env/bin/python", "/opt/homebrew/bin/mpirun", "/home/me", "10.0.0.0/30", ("B=3",))
    line = mpirun_line(run, [run.python, "train.py", "--steps", "5"])
    text = " ".join(line)
    assert line[:3] == ["/opt/homebrew/bin/mpirun", "--prefix", "/opt/homebrew"]
    assert "--host mac1:2,mac2:1 -n 3 --map-by slot --bind-to none --wdir /home/me --output rank" in text
    assert "--mca btl_tcp_if_include 10.0.0.0/30" in text
    assert "prte_if_include" not in text, "the launcher is none of these hosts"
    assert "--prtemca oob_tcp_keepalive_time" in text
    assert "-o BatchMode=yes -o ConnectTimeout=5 -o ServerAliveInterval=2" in text
    assert line[-4:] == ["/env/bin/python", "train.py", "--steps", "5"]
    forwarded = {line[i + 1] for i, word in enumerate(line) if word == "-x"}
    assert forwarded == {"OMP_NUM_THREADS=3", "A=1", "B=3"} | {
        f"{name}={os.environ[name]}"
        for name in os.environ
        if name.startswith("DISTCLIP_") and name not in ("DISTCLIP_RANK_PROCESS", "DISTCLIP_TERMINAL")
    }
    assert line[line.index("btl") + 1] == "tcp,self"
    assert ("--allow-run-as-root" in line) == (os.getuid() == 0)


def test_the_launcher_binds_its_own_connections_where_it_is_one_of_the_hosts() -> None:
    assert "prte_if_include" in mpirun_line(job("--hosts", "127.0.0.1,127.0.0.2"), ["true"])


def test_an_argument_stays_one_word_in_every_shell(tmp_path: Path) -> None:
    nasty = ["a b", "$(touch made)", "`touch made`", "; touch made", "it's", 'say "no"', "*", "", "new\nline", "~"]
    there = ssh_line(Host("mac1"), ["printf", "<%s>", *nasty])[-1]
    here = shlex.join(["printf", "<%s>", *mpirun_line(job("--hosts", "mac1", "--env", "A=$(touch made)"), nasty)])
    shown = []
    for text in (there, here):
        ended = subprocess.run(["sh", "-c", text], capture_output=True, text=True, cwd=tmp_path, timeout=10)
        shown.append(ended.stdout)
    assert shown[0] == "".join(f"<{text}>" for text in nasty)
    assert shown[1].endswith("<A=$(touch made)>" + shown[0])
    assert list(tmp_path.iterdir()) == []
