"""``distclip doctor`` on this machine alone, and how findings come about; tests/cluster has it on several hosts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import BIN, Ended, launch

from distclip.cli import main
from distclip.cluster import agent, checks, network
from distclip.cluster.agent import describe, networks, parse_netstat
from distclip.cluster.checks import Finding
from distclip.cluster.doctor import Diagnosis, table
from distclip.cluster.hosts import Cluster, Host, Job

pytestmark = pytest.mark.launches

JOB = Job(Cluster((Host("a"), Host("b"))), 2, sys.executable, str(BIN / "mpirun"), "/", "10.0.0.0/24")


def doctor(folder: Path, *options: str, **variables: str) -> tuple[Ended, dict[str, Finding]]:
    """How it ends, and its findings by check; the table says the same as the JSON."""
    file = folder / "doctor.json"
    ended = launch([sys.executable, "-m", "distclip", "doctor", "--json", str(file), *options], folder, variables)
    report = json.loads(file.read_text())
    findings = {entry["check"]: Finding(*entry.values()) for entry in report["findings"]}
    for finding in findings.values():
        state = "FAILED" if not finding.ok else "slower" if finding.remedy else "ok"
        assert f"{state:6}  {finding.check} " in ended.output
        assert not finding.remedy or f"      -> {finding.remedy}\n" in ended.output
    assert report["healthy"] == all(finding.ok for finding in findings.values()) == (ended.code == 0)
    return ended, findings


def test_a_healthy_machine(tmp_path: Path) -> None:
    ended, findings = doctor(tmp_path)
    assert ended.code == 0, ended.output
    assert list(findings) == ["python", "distclip", "mlx", "kernel", "mpi4py", "Open MPI", "library", "norm"]
    assert findings["python"].message.endswith(f", {sys.executable}")
    assert findings["library"].message == f"{next(BIN.parent.glob('lib/libmpi*.40*'))}, for MLX and mpi4py"
    assert findings["norm"].message == f"{(1000 * (1 + 4 + 9)) ** 0.5:.7g} on all 2 ranks, as expected"
    assert max(map(len, ended.output.splitlines())) <= 100


def test_a_library_that_is_none(tmp_path: Path) -> None:
    library = tmp_path / "libmpi.so.40"
    library.write_text("INPUT(libmpi.so)")
    ended, findings = doctor(tmp_path, MLX_MPI_LIBNAME=str(library), DISTCLIP_ENGINE="mlx")
    assert ended.code == 1, ended.output
    assert findings["kernel"].message.startswith("MLX operations (")
    assert ": DISTCLIP_ENGINE=mlx" in findings["kernel"].message
    assert [check for check, finding in findings.items() if not finding.ok] == ["library"]
    assert f"{library} cannot be loaded" in findings["library"].message
    assert findings["library"].remedy.startswith("unset MLX_MPI_LIBNAME")


@pytest.mark.parametrize("source", ["the hosts file", "an option", "an option, one machine", "the environment"])
def test_a_variable_that_can_hang_a_mac(source: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nif 'PLAY_MAC' in os.environ: sys.platform = 'darwin'\n")
    envs = ["PLAY_MAC=1"]
    options, variables = ["--hostfile", str(tmp_path / "hosts.json")], {"PYTHONPATH": str(tmp_path)}
    if source == "the hosts file":
        envs += ["MLX_METAL_FAST_SYNCH=1"]
    elif source == "an option, one machine":
        options = ["--env", "PLAY_MAC=1", "--env", "MLX_METAL_FAST_SYNCH=1"]
    elif source == "an option":
        options += ["--env", "MLX_METAL_FAST_SYNCH=1"]
    else:
        variables |= {"MLX_METAL_FAST_SYNCH": "1"}
    (tmp_path / "hosts.json").write_text(json.dumps({"envs": envs, "hosts": [{"ssh": "localhost"}]}))
    ended, findings = doctor(tmp_path, *options, **variables)
    assert [check for check, finding in findings.items() if not finding.ok] == ["variables"]
    assert findings["variables"].message.startswith("MLX_METAL_FAST_SYNCH=1 can hang the GPU")
    assert findings["variables"].remedy.endswith("--env MLX_METAL_FAST_SYNCH=0")
    assert "Left out, since it would fail: the run" in ended.output
    ended, findings = doctor(tmp_path, *options, "--env", "MLX_METAL_FAST_SYNCH=0", **variables)
    assert "variables" not in findings, "the remedy is one"


def test_no_mpirun_and_another_python(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=60)
    ended, findings = doctor(tmp_path, "--mpirun", "/nowhere/mpirun", "--python", f"{bare}/bin/python")
    assert ended.code == 1, ended.output
    assert [check for check, finding in findings.items() if not finding.ok] == ["mlx", "Open MPI"]
    assert f"{bare}/bin/python -m pip install" in findings["mlx"].remedy
    assert "'/nowhere/mpirun'" in findings["Open MPI"].message
    assert "Left out, since it would fail: the run with two ranks." in ended.output


HERE = {
    "hostname": "here",
    "networks": [],
    "system": "Darwin",
    "daemon": True,
    "mpirun": "5.0.11",
    "python": ["3.12.1", "/p"],
}
PROBE = {"error": None, "versions": {"mlx": "1", "mpi4py": "1", "distclip": "1"}, "code": "c", "warning": None}
ON_CPU = PROBE | {"device": "cpu", "wanted": None, "cpu": "native", "engine": "native", "gpu_problem": ""}
ON_GPU = ON_CPU | {"device": "gpu", "engine": "gpu"}
STALE = {"warning": "distclip's kernel was built for mlx 1, and mlx 2 is running, so MLX operations do"}
BROKEN = "distclip's kernels for Metal measure squares of float16 of shape (9,) as 1.0, not as 2.0"
KERNELS: dict[str, tuple[dict[str, Any], bool, str]] = {
    "native": (ON_CPU, True, "the native kernel (cpu)"),
    "none built": (ON_CPU | {"engine": "mlx", "cpu": "mlx"}, True, "MLX operations (cpu), slower: no kernel was built"),
    "mlx": (ON_CPU | {"engine": "mlx", "wanted": "mlx"}, True, "MLX operations (cpu): DISTCLIP_ENGINE=mlx"),
    "stale": (ON_CPU | STALE | {"engine": "mlx", "cpu": "mlx"}, True, "(cpu), slower: distclip's kernel was built for"),
    "stale, demanded": (
        PROBE | {"device": "cpu", "wanted": "native", "error": "ImportError: distclip's kernel was built for mlx 1"},
        False,
        "ImportError: distclip's kernel was built for mlx 1",
    ),
    "gpu, stale": (ON_GPU | STALE | {"cpu": "mlx"}, True, "MLX operations, slower: distclip's kernel was built for"),
    "gpu": (ON_GPU, True, "the GPU kernels (gpu); with stream=mx.cpu the native kernel"),
    "gpu, mlx": (
        ON_GPU | {"engine": "mlx", "cpu": "mlx", "wanted": "mlx", "gpu_problem": "DISTCLIP_ENGINE=mlx forbids them"},
        True,
        "MLX operations (gpu): DISTCLIP_ENGINE=mlx; with stream=mx.cpu MLX operations",
    ),
    "gpu, wrong": (ON_GPU | {"engine": "mlx", "gpu_problem": BROKEN}, False, BROKEN),
    "gpu, demanded": (
        PROBE | {"device": "gpu", "wanted": "gpu", "error": "ImportError: DISTCLIP_ENGINE=gpu, but it is broken"},
        False,
        "ImportError: DISTCLIP_ENGINE=gpu, but it is broken",
    ),
    "gpu, killed": (ON_GPU | {"engine": "mlx", "wanted": "mlx", "signal": 6}, False, "ends Python with signal 6"),
}


@pytest.mark.parametrize(("probe", "ok", "message"), KERNELS.values(), ids=KERNELS)
def test_the_engine_and_why(probe: dict[str, Any], ok: bool, message: str) -> None:
    findings = checks.check_installed(JOB, {"here": HERE | {"probe": probe}}, HERE)
    (kernel,) = [finding for finding in findings if finding.check == "kernel"]
    assert (kernel.ok, message in kernel.message) == (ok, True), kernel
    assert bool(kernel.remedy) == (not ok or "slower" in message)
    if not ok:
        remedy = ("DISTCLIP_ENGINE=mlx", "--only device") if probe["device"] == "gpu" else ("pip install",)
        assert all(part in kernel.remedy for part in remedy), kernel


def test_a_kernel_that_does_not_load_on_one_host_alone() -> None:
    """It works by itself, but engines do not mix."""
    stale = ON_CPU | STALE | {"engine": "mlx", "cpu": "mlx"}
    facts = {"a": HERE | {"probe": ON_CPU}, "b": HERE | {"probe": ON_CPU}, "c": HERE | {"probe": stale}}
    findings = [finding for finding in checks.check_installed(JOB, facts, HERE) if finding.check == "kernel"]
    assert [finding.ok for finding in findings] == [True, True, False]


def test_after_a_change_of_mlx_it_runs_slower(tmp_path: Path) -> None:
    """Another version is said to be running: the kernel is not loaded, and all else works."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as it\nof = it.version\nit.version = lambda n: '0.32.99' if n == 'mlx' else of(n)\n"
    )
    ended, findings = doctor(tmp_path, PYTHONPATH=str(tmp_path))
    assert ended.code == 0, ended.output
    assert "norm" in findings, "the run with two ranks works, and was made"
    assert "slower" in findings["kernel"].message
    assert "slower  kernel" in ended.output
    assert f"What makes it faster:\n  {findings['kernel'].host}, kernel: " in ended.output


def test_an_mlx_that_is_too_old(tmp_path: Path) -> None:
    """An older MLX lacks a name; its import says so, and the doctor how to mend it."""
    (tmp_path / "sitecustomize.py").write_text("import mlx.core as mx\ndel mx.ThreadLocalStream\n")
    ended = launch([sys.executable, "-c", "import distclip as dc; dc.init()"], tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert ended.code == 1
    assert "ImportError: distclip needs mlx 0.32.3 or later, and mlx 0.32." in ended.output
    ended, findings = doctor(tmp_path, PYTHONPATH=str(tmp_path))
    assert [check for check, finding in findings.items() if not finding.ok] == ["mlx"]
    assert "pip install --force-reinstall 'mlx" in findings["mlx"].remedy
    assert ">=0.32.3,<0.33'" in findings["mlx"].remedy


@pytest.mark.parametrize("also_mlx", [False, True])
def test_a_kernel_that_ends_python_is_told_from_a_broken_mlx(also_mlx: bool, tmp_path: Path) -> None:
    condition = "True" if also_mlx else "os.environ.get('DISTCLIP_ENGINE') != 'mlx'"
    program = f"import os\nif os.environ.get('KILLED') and {condition}: os.abort()\n"
    (tmp_path / "sitecustomize.py").write_text(program)
    source = Path(agent.__file__).read_text()
    probe = agent.probe_in_subprocess(source, {"PYTHONPATH": str(tmp_path), "KILLED": "1", "DISTCLIP_ENGINE": ""})
    assert probe["signal"] == signal.SIGABRT
    assert ("engine" in probe, probe.get("engine")) == ((False, None) if also_mlx else (True, "mlx"))


@pytest.mark.parametrize("options", ["--hosts a:x", "train.py", "--hosts a --python python"])
def test_bad_options(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *options.split()])
    assert ended.value.code == 2
    assert "distclip doctor: error: " in capsys.readouterr().err


def test_what_ranks_say() -> None:
    version = "Open MPI v5.0.11, package: x"
    good = {
        "library": "/l",
        "version": version,
        "mpi4py": version,
        "loaded": ["/l"],
        "norm": (2.0).hex(),
        "right": True,
    }

    def failed(*reports: dict[str, Any]) -> list[tuple[str, str]]:
        findings = checks.check_ranks(JOB, "5.0.11", ["a", "b"], dict(enumerate(reports)))
        return [(finding.host, finding.check) for finding in findings if not finding.ok]

    assert failed(good, good) == []
    assert failed(good, good | {"norm": (3.0).hex()}) == [("a", "norm"), ("b", "norm")]
    assert failed(good, good | {"right": False}) == [("b", "norm")]
    assert failed(good, good | {"mpi4py": "MPICH Version: 4.2"}) == [("b", "library")]
    assert failed(good, good | {"loaded": ["/l", "/m"]}) == [("b", "library")]
    assert failed(good, good | {"version": version.replace("11", "7")}) == [("b", "library")]


def test_which_interface_carries_the_bytes() -> None:
    facts = {"a": {"networks": [["en5", "10.0.0.1", 24], ["en0", "192.168.1.1", 24]]}}

    def carried(en5: int, en0: int) -> Finding:
        counts = ({"en5": 7, "en0": 7, "bridge0": 0}, {"en5": 7 + en5, "en0": 7 + en0, "bridge0": en5})
        return next(iter(network.check_bytes(JOB, facts, {"a": counts[0]}, {"a": counts[1]})))

    assert carried(10**8, 10**6) == Finding("a", "bytes", True, "by en5")
    assert carried(10**8, 10**8).message == "by en5 50%, en0 50%, but 10.0.0.0/24 was selected"
    assert not carried(10**6, 10**8).ok


def test_slow_links() -> None:
    speeds = {("a", "b"): 9.0, ("a", "c"): 1.9, ("b", "c"): 1.7}
    links = [{"hosts": list(pair), "latency_us": 30.0, "bandwidth_gbit_s": speed} for pair, speed in speeds.items()]
    findings = list(network.check_links(links))
    assert [finding.host for finding in findings if not finding.ok] == ["b - c"]
    assert findings[2].message == "30 us, 1.7 Gbit/s, and the best link has 9"


def test_what_tells_files_apart(tmp_path: Path) -> None:
    first, second, sparse = (tmp_path / name for name in ("first", "second", "sparse"))
    first.write_text("a")
    second.write_text("b")
    with sparse.open("wb") as file:
        file.truncate(10**9)
    assert describe(str(first)) == {"folder": False, "bytes": 1, "digest": "ca978112ca1bbdca"}
    assert describe(str(first)) != describe(str(second))
    assert describe(str(tmp_path / "none")) is None
    before = describe(str(tmp_path))
    assert before is not None
    assert before["bytes"] == 10**9 + 2
    second.rename(tmp_path / "third")
    assert describe(str(tmp_path)) != before
    whole = describe(str(sparse))  # a GB, of which two MB are read
    with sparse.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert describe(str(sparse)) != whole


def test_addresses_of_this_machine() -> None:
    for _, address, length in networks():
        assert not address.startswith("127.")
        assert 0 < length <= 32


def test_bytes_on_a_mac() -> None:
    listing = """\
Name       Mtu   Network       Address            Ipkts Ierrs     Ibytes    Opkts Oerrs     Obytes  Coll
lo0        16384 <Link#1>                          9117     0    1210412     9117     0    1210412     0
lo0        16384 127           127.0.0.1           9117     -    1210412     9117     -    1210412     -
en5        1500  <Link#7>      0a:1b:2c:3d:4e:5f  70000     0   90000000    80000     0   10000000     0
utun0*     1380  <Link#9>                             0     0          0        7     0        560     0
"""
    assert parse_netstat(listing) == {"lo0": 2 * 1210412, "en5": 100_000_000, "utun0": 560}


def test_the_table_has_a_line_for_each_check() -> None:
    findings = [Finding("a", "ssh", True, "works"), Finding("b", "ssh", False, "refused", "start it")]
    findings += [
        Finding("a", "mlx", True, "1.0"),
        Finding("a", "network", True, "x" * 60),
        Finding("b", "network", True, "y" * 60),
    ]
    assert table(Diagnosis(findings, left_out="the run")) == [
        "FAILED  ssh      b",
        "ok      mlx      1.0",
        f"ok      network  a: {'x' * 60}; b:",
        f"                 {'y' * 60}",
        "",
        "Left out, since it would fail: the run.",
        "",
        "What to do (1 of 5 checks failed):",
        "  b, ssh: refused",
        "      -> start it",
    ]
