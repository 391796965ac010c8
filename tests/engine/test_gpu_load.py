"""The kernels for GPUs are given out where they work, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterator

import mlx.core as mx
import pytest
from reference import alone

from distclip.engine import gpu
from distclip.engine.gpu.source import backend
from engine.emulation import Emulation, emulated, needs_emulation

pytestmark = [alone, needs_emulation]


@pytest.fixture(autouse=True)
def emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    monkeypatch.delenv("DISTCLIP_ENGINE", raising=False)
    with emulated() as emulation:
        yield emulation
        monkeypatch.undo()  # first, since the test patches what the emulation has patched


def test_the_kernels_are_given_out_where_they_work(emulation: Emulation) -> None:
    assert gpu.problem() == ""
    assert gpu.load() is gpu
    launches = len(emulation.launches)
    assert gpu.load() is gpu
    assert len(emulation.launches) == launches  # verified once


@pytest.mark.skipif(mx.metal.is_available() or mx.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_there_are_no_kernels_and_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.source, "backend", backend)
    assert gpu.load() is None
    assert gpu.problem() == "MLX has neither Metal nor CUDA here"


def test_the_environment_forbids_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCLIP_ENGINE", "mlx")
    assert gpu.load() is None
    assert "DISTCLIP_ENGINE=mlx" in gpu.problem()


FAULTS = {
    "does not compile": (("distclip::measure(", "distclip::gauge("), "cannot run: .*gauge"),
    "sums wrongly": (("sum.lo + (lost + rest)", "sum.lo + rest"), "measure squares of float32 .* as .*, not as"),
    "scales wrongly": (("* factor)", "+ factor)"), "scale float32 of shape .* wrongly: .* times 0.375 is"),
}


@pytest.mark.parametrize(("mistake", "problem"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("wanted", ["", "gpu"])
def test_kernels_that_do_not_work_are_not_given_out(
    mistake: tuple[str, str], problem: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTCLIP_ENGINE", wanted)
    with emulated(Emulation(mistake=mistake)):
        assert re.search(problem, gpu.problem())
        if wanted:
            with pytest.raises(ImportError, match=f"DISTCLIP_ENGINE=gpu, but distclip's kernels for Metal {problem}"):
                gpu.load()
            return
        with pytest.warns(RuntimeWarning, match=f"kernels for Metal {problem}.* MLX operations .* report .*mlx 0"):
            assert gpu.load() is None
        assert gpu.load() is None  # warns once


def test_where_kernels_are_demanded_a_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCLIP_ENGINE", "gpu")
    monkeypatch.setattr(gpu.source, "backend", lambda: "")
    with pytest.raises(ImportError, match="DISTCLIP_ENGINE=gpu, but MLX has neither Metal nor CUDA here"):
        gpu.load()


def test_the_kernels_are_verified_inside_a_trace() -> None:
    def double(x: mx.array) -> mx.array:
        gpu.load.cache_clear()
        gpu.problem.cache_clear()
        assert gpu.load() is gpu
        return 2 * x

    assert mx.compile(double)(mx.array(2.0)).item() == 4.0
    assert mx.grad(double)(mx.array(2.0)).item() == 2.0
