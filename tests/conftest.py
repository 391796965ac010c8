"""One suite for any number of ranks: the same files run alone, under mpirun, and over MLX's ring.

A rank that fails leaves at once and takes the job with it; waiting for ranks that wait for it would hang.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import devices
import mlx.core as mx
import pytest

import distclip

if "DEVICE" in os.environ:  # cpu or gpu, as in MLX's own tests
    mx.set_default_device(getattr(mx, os.environ["DEVICE"]))
if devices.played() in ("gpu", "mlx"):
    devices.play_default_device(devices.played())
WORLD = distclip.init()  # before pytest-mpi or a test imports mpi4py.MPI
if devices.played() == "stream":
    devices.play_default_stream(WORLD.stream)
TEST_LIMIT_S = 120
if WORLD.size > 1:  # pytest clears old folders below its root at the end, and ranks would clear each other's
    os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.mkdtemp(prefix=f"rank-{WORLD.rank}-")
if WORLD.rank > 0:  # MLX keeps there what mx.compile compiles, and a rank may load what another one still writes
    os.environ["TMPDIR"] = f"{tempfile.gettempdir()}/of-rank-{WORLD.rank}"
    os.makedirs(os.environ["TMPDIR"], exist_ok=True)

ROOT = Path(__file__).parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if WORLD.rank > 0:  # rank 0 reports progress, the others only what fails
        session.config.pluginmanager.unregister(name="terminalreporter")


_stderr = 2


def pytest_configure(config: pytest.Config) -> None:
    global _stderr
    _stderr = os.dup(2)  # while a test runs 2 is pytest's own file, which ends with the process
    if devices.played() == "stream":  # what is traced waits for the network there, and says so
        config.addinivalue_line("filterwarnings", "ignore:A GPU waits for the other ranks")


def pytest_report_header() -> str:
    return (
        f"distclip: {WORLD.size} rank(s), backend {WORLD.backend}, on {socket.gethostname()}, mlx {version('mlx')} on "
        f"{mx.default_device()}, MPI library {os.environ.get('MLX_MPI_LIBNAME', 'not loaded')}"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if WORLD.size > 1 and item.get_closest_marker("launches"):
            item.add_marker(pytest.mark.skip(reason="starts processes itself, so it runs when the tests run alone"))
        if WORLD.backend == "ring" and item.get_closest_marker("mpi"):
            item.add_marker(pytest.mark.skip(reason="needs sub-groups, which MLX's ring does not have"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and WORLD.rank > 0:
        print(f"\nrank {WORLD.rank}: {report.nodeid} failed in {report.when}\n{report.longreprtext}", file=sys.stderr)


_status = 0


def pytest_sessionfinish(exitstatus: int) -> None:
    global _status
    _status = int(exitstatus)
    if _status == 0 and "DISTCLIP_TEST_MARKS" in os.environ:  # mlx.launch returns 0 whatever its ranks return
        (Path(os.environ["DISTCLIP_TEST_MARKS"]) / f"rank-{WORLD.rank}").touch()


def pytest_unconfigure() -> None:
    if _status != 0 and WORLD.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)


@pytest.fixture(autouse=True)
def time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the whole job, with every thread's stack, when a test takes too long."""
    marker = request.node.get_closest_marker("time_limit")
    faulthandler.dump_traceback_later(TEST_LIMIT_S if marker is None else marker.args[0], exit=True, file=_stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def world() -> distclip.World:
    return WORLD


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[mx.Stream]:
    """The default stream of the test, on which nothing may wait for other ranks: a CPU stream that plays a device."""
    devices.pin_collectives(WORLD.stream, monkeypatch.setattr)
    stream = mx.new_stream(mx.cpu)
    with mx.stream(stream):
        yield stream


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each collective of ``mx.distributed`` was called during the test."""
    counts: Counter[str] = Counter()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    for name in ("all_sum", "all_max", "all_min", "all_gather", "sum_scatter", "send", "recv"):
        monkeypatch.setattr(mx.distributed, name, counted(name, getattr(mx.distributed, name)))
    return counts
