"""``distclip bench`` on a device: engines beside each other, peaks of memory, and the part ``device``.

A second CPU stream plays the device where there is no GPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from engine.emulation import Emulation, emulated, needs_emulation
from launching import launch
from reference import alone, normal, powers64

import distclip as dc
from distclip.bench import device, engines, first_use
from distclip.bench.device import Reading
from distclip.bench.show import readings_table
from distclip.bench.timing import Contestant, interleave, work_of
from distclip.bench.trees import Grads
from distclip.engine import gpu, kernels
from distclip.engine.gpu import measuring, source

SMALL = ["--quick", "--rounds", "1", "--megabytes", "1"]
LIMIT_S = 90


@pytest.fixture
def played() -> mx.Stream:
    return mx.new_stream(mx.cpu)


def bench(folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, "-m", "distclip", "bench", *SMALL, "--json", "bench.json", *options]
    ended = launch(command, folder, limit_s=LIMIT_S)
    assert ended.code == 0, ended.output
    return ended.output, json.loads((folder / "bench.json").read_text())


# --------------------------------------------------------------------------------------------------- the command


@pytest.mark.launches
def test_one_command_measures_a_device(tmp_path: Path) -> None:
    output, written = bench(tmp_path, "--only", "device", "--device", "cpu")
    questions = list(dict.fromkeys(reading["question"] for reading in written["device"]))
    assert [question.split(":")[0].split(",")[0] for question in questions] == [
        "time to compile",
        "distclip's kernels for GPUs",
        "measuring one leaf of 1 MB",
        "measuring one leaf of 1 MB of bfloat16",
        "one launch",
        "one crossing",
        "peak memory of a clip above the gradients",
        "1",  # 1,000 values of ...
        "1",
        "1",
    ]
    assert all(question in output for question in questions)
    assert {result["case"] for result in written["results"]} == {
        "norm",
        "clip, given up",
        "no clip, given up",
        "scale, given up",
    }
    ours = f"distclip ({written['machine']['engine']})"
    for result in written["results"]:
        names = [series["name"] for series in result["series"]]
        if result["part"] != "device":
            assert {ours, "distclip (mlx)", "MLX"} <= set(names)
            assert not [name for name in names if "torch" in name or "read" in name]
    (mlx,) = [
        series
        for result in written["results"]
        for series in result["series"]
        if (result["case"], result["dtype"], series["name"]) == ("norm", "bfloat16", "MLX")
    ]
    assert mlx["error"] > 1e-4  # bfloat16 added in bfloat16
    machine = written["machine"]
    assert {"processor", "memory_bytes", "mlx", "system", "gpu", "engine"} <= machine.keys()


@pytest.mark.launches
@pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    output, written = bench(tmp_path, "--only", "device")
    assert output.count("The part device needs a GPU") == 1
    assert written["device"] == written["results"] == []
    assert len(written["left_out"]) == 1


# ---------------------------------------------------------------------------------------------------- readings


@alone
def test_the_next_process_is_measured_too() -> None:
    longer = first_use.measure_in_child(mx.default_stream(mx.cpu))
    assert isinstance(longer, dict), longer
    assert set(longer) == {"load", *(f"{name}, {x}" for name in ("norm", "scale") for x in first_use.DTYPES)}
    assert isinstance(longer["load"], float)


@alone
def test_a_process_that_dies_is_a_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: mx.Stream) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho compiling >&2\necho 'the GPU is lost' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    readings = {reading.name: reading.value for reading in device.first_uses(played)}
    assert readings["the next"] == "the GPU is lost"
    assert isinstance(readings["this one: load"], float)


@alone
def test_the_readings_of_a_device_that_a_cpu_stream_plays(played: mx.Stream) -> None:
    grads = Grads([(1000,)] * 20, ["bfloat16"] * 20)
    readings = {(reading.question, reading.name): reading.value for reading in device.readings(played, grads, 1)}
    assert float(readings["one crossing", "device -> CPU -> device"]) > 0
    assert float(readings[f"measuring one leaf of 0.04 MB, {kernels.engine()}", "bfloat16"]) > 0
    subnormal = {key: value for key, value in readings.items() if "subnormal" in key[0]}
    assert len(subnormal) == 15
    for (question, name), value in subnormal.items():
        if name == "norm, MLX":  # it squares in the dtype of the leaf
            assert value == (pytest.approx(1, rel=1e-2) if "float16" in question.split() else 0)
        elif kernels.engine() == "native":
            assert value == (pytest.approx(1) if name.startswith("norm") else 1000)
    first = readings["peak memory of a clip above the gradients, which are given up", "clipped: mx.eval(norm) first"]
    assert float(first) < 10 or kernels.engine() != "native"


@alone
def test_each_block_size_is_in_the_source_that_the_gpu_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    before, compiled = source.measuring("squares", mx.bfloat16, "metal"), []

    def sum_squares(leaves: list[mx.array]) -> mx.array:
        assert measuring._plan(((leaves[0].shape, mx.bfloat16),)).launches[0].groups[0] == -(-(1 << 20) // values())
        compiled.append((values(), constant("BATCH")))
        return leaves[0].sum()

    def constant(name: str) -> int:
        header = source.measuring("squares", mx.bfloat16, "metal").header
        return int(header.split(f"#define {name} ")[1].split()[0])

    def values() -> int:
        return constant("CHUNK")

    monkeypatch.setattr(kernels, "engine", lambda: "gpu")
    monkeypatch.setattr(kernels, "sum_squares", sum_squares)
    readings = list(device._block_sizes(1 << 21, rounds=1))
    assert list(dict.fromkeys(compiled)) == device.BLOCKS
    assert len(readings) == len({reading.name for reading in readings}) == len(device.BLOCKS)
    assert source.measuring("squares", mx.bfloat16, "metal") == before


@alone
@needs_emulation
@pytest.mark.parametrize(("values", "batch"), [device.BLOCKS[0], device.BLOCKS[-1]])
def test_another_block_size_measures_rightly(values: int, batch: int) -> None:
    leaves = [normal((n,), n, mx.bfloat16) for n in (5, 70_001, 300_000)]
    with emulated(), device._block_size(values, batch):
        measured = np.array(gpu.sum_squares(leaves))
    np.testing.assert_allclose(measured, [[powers64([leaf]), 0] for leaf in leaves], rtol=1e-12)


@alone
@needs_emulation
def test_compiling_is_what_the_first_use_takes_longer() -> None:
    stream = mx.default_stream(mx.cpu)
    with emulated(Emulation(mistake=("CHUNK 65536", "CHUNK 65536 + 0"))):  # a text that no other test compiles
        longer = first_use.measure(stream)
    assert all(float(longer[f"norm, {dtype}"]) > 0.2 for dtype in first_use.DTYPES), longer
    with emulated(Emulation(mistake=("struct Sum {", "struct Sum; {"))):
        longer = first_use.measure(stream)
    assert "Unable to build" in str(longer["norm, float32"])


@alone
def test_an_answer_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, played: mx.Stream) -> None:
    def fails(leaves: list[mx.array], stream: Any = None) -> mx.array:
        raise RuntimeError("[metal::Device] Unable to build")

    monkeypatch.setattr(kernels, "sum_squares", fails)
    readings = list(device.readings(played, Grads([(10,)], ["bfloat16"]), 1))
    failed = {reading.name for reading in readings if reading.question == "failed"}
    assert failed == {"measuring", "memory", "subnormal numbers"}
    assert any(reading.question == "one crossing" for reading in readings)


@alone
def test_a_crossing_costs_what_the_other_stream_takes(monkeypatch: pytest.MonkeyPatch, played: mx.Stream) -> None:
    """Work on the host that lasts for long must show in the crossing, and not in the launches."""
    host, add = mx.default_stream(mx.cpu), mx.add

    def slow(x: Any, y: Any, stream: Any) -> mx.array:
        if stream != host:
            return add(x, y, stream=stream)
        large = mx.broadcast_to(x.sum(stream=host), (1 << 20,), stream=host)
        return add(mx.sin(large, stream=host).sum(stream=host), y, stream=host)

    monkeypatch.setattr(mx, "add", slow)
    monkeypatch.setattr(device, "OPERATIONS", 20)
    monkeypatch.setattr(device, "CROSSINGS", 4)
    with mx.stream(played):
        launches = [reading.value for reading in device._launches(played, 3)]
        (crossing, _) = [reading.value for reading in device._crossings(played, host, 3)]
    assert isinstance(crossing, float)
    assert crossing > 1000
    assert all(isinstance(us, float) and us < crossing / 4 for us in launches)


def test_the_table_of_readings_groups_by_question() -> None:
    readings = [Reading("why", "a", 1.23456, "ms"), Reading("why", "bc", "no answer"), Reading("how", "d", 2.0)]
    assert readings_table(readings).splitlines() == [
        "why",
        "  a        1.235 ms",
        "  bc  no answer",
        "how",
        "  d            2",
    ]


# ------------------------------------------------------------------------------------------- engines and turns


@alone
def test_each_engine_works_in_its_own_turn_alone() -> None:
    default = kernels.engine()
    worked: list[str] = []

    def function(tree: Any) -> tuple[Any, Any]:
        worked.append(kernels.engine())
        return dc.clip_grad_norm(tree, 1.0)

    contestants = [engine.contestant(function, lambda: [mx.ones(9)]) for engine in engines.available()]
    assert contestants[0].name == f"distclip ({default})"
    series = interleave(contestants, 1, truth=3.0)
    assert sorted(worked) == sorted([default, "mlx"] * 2 if default != "mlx" else ["mlx"] * 2)
    assert [s.error for s in series] == [0.0] * len(series)
    assert kernels.engine() == default


@pytest.fixture
def read_again() -> Iterator[None]:
    """The engines read the environment again once the test's own is gone."""
    yield
    for function in engines.READ_ONCE:
        function.cache_clear()


@alone
@pytest.mark.parametrize("before", [None, "", "mlx"])
def test_the_environment_is_left_as_it_was(
    before: str | None, read_again: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(engines.VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(engines.VARIABLE, before)
    seen: list[str] = []

    def fails(_: Any) -> tuple[Any, Any]:
        seen.append(os.environ[engines.VARIABLE])
        raise ValueError("of the work")

    contestant = engines.Engine("mlx", variable="mlx").contestant(fails, list)
    with pytest.raises(ValueError, match="of the work"):
        interleave([contestant], 1)
    assert (seen, os.environ.get(engines.VARIABLE)) == (["mlx"], before)


@alone
def test_the_engines_of_a_gpu_have_the_native_kernel_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "engine", lambda stream=None: "gpu" if stream is None else "native")
    assert [str(engine) for engine in engines.available()] == [
        "distclip (gpu)",
        "distclip (mlx)",
        "distclip (native, stream=mx.cpu)",
    ]


@alone
def test_what_a_neighbour_left_running_is_in_nobodys_time() -> None:
    x = mx.random.normal((1 << 20,))
    mx.eval(x)

    def leaves_work_behind(_: list[Any]) -> tuple[Any, Any]:
        mx.async_eval(mx.sin(mx.cos(mx.sin(x))).sum())
        return None, None

    def measured(work: Any) -> float:
        before, after = (Contestant(name, lambda: None, work) for name in ("before", "after"))
        quick = Contestant("quick", lambda: None, work_of(lambda _: (x + 0, None)), mlx=True)
        return interleave([before, quick, after], 5)[1].median  # in every order of turns one goes before it

    def nothing(_: list[Any]) -> tuple[Any, Any]:
        return None, None

    begin = time.perf_counter()
    mx.eval(mx.sin(mx.cos(mx.sin(x))).sum())
    left_behind = time.perf_counter() - begin
    assert measured(leaves_work_behind) < measured(nothing) + left_behind / 4


@alone
def test_the_peak_is_what_the_work_takes_above_its_gradients() -> None:
    def fresh() -> list[mx.array]:
        arrays = [mx.ones(1 << 20)]
        mx.eval(arrays)
        return arrays

    def contestants() -> Iterator[Contestant]:
        yield Contestant("kept", fresh, work_of(lambda tree: ([tree[0] * 2], None), given_up=False), mlx=True)
        yield Contestant("of another library", fresh, work_of(lambda tree: (None, None)))

    kept, other = interleave(list(contestants()), 2)
    assert kept.peak_bytes == pytest.approx(4 << 20, rel=0.05)
    assert other.peak_bytes is None


@alone
def test_a_turn_is_taken_in_what_is_around_it() -> None:
    events: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        events.append("in")
        yield
        events.append("out")

    def work(_: list[Any]) -> tuple[Any, Any]:
        events.append("work")
        return None, None

    interleave([Contestant("a", lambda: events.append("fresh"), work, around=around)], 1)
    assert events == ["fresh", "in", "work", "out"] * 2
