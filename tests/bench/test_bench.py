"""``distclip bench``: measurements, output and files, at small sizes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from launching import MPIRUN, SHARE_CORES, Ended, launch, under_mpirun
from reference import alone, norm64, relative

from distclip.bench.show import summary, table
from distclip.bench.timing import Contestant, Result, Series, interleave
from distclip.bench.trees import Grads, average_norm, lora, qwen, trees
from distclip.cli import main
from distclip.engine import native

SMALL = ["--quick", "--rounds", "1", "--megabytes", "1"]
LIMIT_S = 90


def bench(folder: Path, *options: str, ranks: int = 1) -> tuple[Ended, dict[str, Any]]:
    """Run the command where neither torch nor optax can be imported, and read its JSON file."""
    for name in ("torch", "optax"):
        (folder / f"{name}.py").write_text(f"raise ImportError('no {name} in this test')")
    mpirun = [str(MPIRUN), "-n", str(ranks), *SHARE_CORES] if ranks > 1 else []
    command = [*mpirun, sys.executable, "-m", "distclip", "bench", *SMALL, "--json", "bench.json", *options]
    ended = launch(command, folder, {"PYTHONPATH": str(folder)}, limit_s=LIMIT_S)
    file = folder / "bench.json"
    return ended, json.loads(file.read_text()) if file.exists() else {}


def names(written: dict[str, Any], case: str) -> list[str]:
    return [series["name"] for result in written["results"] if result["case"] == case for series in result["series"]]


@pytest.mark.launches
def test_alone_it_measures_everything_one_process_can(tmp_path: Path) -> None:
    ended, written = bench(tmp_path, "--chart", "chart.png")
    assert ended.code == 0, ended.output
    cases = {result["case"] for result in written["results"]}
    assert cases == {"norm", "clip, given up", "no clip, given up", "clip, kept", "training step"}
    assert {result["dtype"] for result in written["results"]} == {"float32", "bfloat16", "float16"}
    ours = f"distclip ({written['machine']['engine']})"
    assert {ours, "distclip (mlx)", "MLX, compiled", "plain read, 1 thread"} <= set(names(written, "norm"))
    assert {f"{ours}, compiled", "plain copy, 1 thread"} <= set(names(written, "clip, kept"))
    for result in written["results"]:
        for series in result["series"]:
            assert all(seconds > 0 for seconds in series["seconds"])
            if series["name"].startswith("distclip (") and result["part"] != "step":
                assert series["error"] < 1e-6
                assert f"\n{result['case']} | {result['tree']} | {result['dtype']}\n" in ended.output
                assert series["peak_bytes"] is not None
    (step,) = [result for result in written["results"] if result["part"] == "step"]
    assert (step["tree"], step["values"]) == ("byte-level transformer, 28 leaves", 132_352)
    assert written["machine"]["cores"] > 0
    assert written["machine"]["engine"] in ("native", "gpu", "mlx")
    assert written["memory"]["clip, kept"]["distclip"] > 0.9
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.launches
def test_a_missing_library_is_named(tmp_path: Path) -> None:
    ended, written = bench(tmp_path, "--only", "norm")
    assert ended.code == 0, ended.output
    for name in ("torch", "optax"):
        assert f"{name} is left out: " in ended.output
        assert not any(contestant.startswith(name) for contestant in names(written, "norm"))
    assert "pip install torch" in ended.output
    assert "pip install jax optax" in ended.output
    assert len(written["left_out"]) == 2


@pytest.mark.launches
def test_under_mpirun_it_measures_what_ranks_do_together(tmp_path: Path) -> None:
    ended, written = bench(tmp_path, "--only", "parallel", ranks=2)
    assert ended.code == 0, ended.output
    assert written["machine"]["ranks"] == 2
    assert [(result["case"], result["dtype"]) for result in written["results"]] == [
        ("average and clip", "float32"),
        ("clip shards", "float32"),
        ("average and clip", "float32 and bfloat16"),
    ]
    assert {"distclip", "distclip, compiled", "MLX", "MLX, compiled"} <= set(names(written, "clip shards"))
    assert "bare all-reduce" in names(written, "average and clip")
    errors = [s["error"] for result in written["results"] for s in result["series"] if s["name"] == "distclip"]
    assert max(errors[:2]) < 1e-6
    assert errors[2] < 1e-3
    assert ended.output.count("average and clip | 256") == 2  # rank 0 alone prints


@pytest.mark.launches
def test_it_ends_when_one_rank_lacks_what_is_measured(tmp_path: Path) -> None:
    program = f"""
        import mlx.nn.utils as utils
        import distclip
        from distclip.cli import main

        if distclip.init().rank == 1:
            del utils.clip_grad_norm_sharded
        main(["bench", *{SMALL}, "--json", "bench.json"])
    """
    ended = under_mpirun(2, program, tmp_path)
    assert ended.code == 0, ended.output
    written = json.loads((tmp_path / "bench.json").read_text())
    assert names(written, "clip shards") == ["distclip", "distclip, compiled"]


@pytest.mark.launches
def test_under_mpirun_it_measures_what_hides_behind_a_backward_pass(tmp_path: Path) -> None:
    ended, written = bench(tmp_path, "--only", "overlap", ranks=2)
    assert ended.code == 0, ended.output
    kinds = ["computes", "sleeps"] if native.load() else ["computes"]
    assert [result["tree"].split()[-3].strip(",") for result in written["results"]] == [
        kind for kind in kinds for _ in range(2)
    ]
    for result in written["results"]:
        step, mlx, backward, reduces = (series["median_s"] for series in result["series"])
        assert min(step, mlx) > max(backward, reduces) / 20
        whole = backward + reduces
        shares = {"hidden by distclip": whole - step, "hidden by MLX": whole - mlx}
        if result["case"] == "backward, average":
            assert result["shares"] == pytest.approx({k: v / min(backward, reduces) for k, v in shares.items()})


@pytest.mark.launches
def test_a_bad_option_gives_one_error_however_many_ranks(tmp_path: Path) -> None:
    ended, _ = bench(tmp_path, "--only", "norm", ranks=2)
    assert ended.code == 2
    assert ended.output.count("on several ranks only parallel and overlap are measured") == 1


@alone
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds: 0 is not a whole number above 0"),
        (["--megabytes", "2.5"], "--megabytes: 2.5 is not"),
        (["--only", "speed"], "--only: invalid choice: 'speed'"),
        (["--only", "parallel"], "mpirun -n 2 distclip bench"),
        (["--json", "no/such/folder/file"], "is no file in a folder that exists"),
        (["--chart", "chart.txt"], "chart.txt should end in .png, .svg or .pdf"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
    ],
)
def test_bad_options_give_one_clear_error(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *options])
    assert ended.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]


@alone
@pytest.mark.parametrize("arguments", [[], ["sing"]], ids=str)
def test_a_command_must_be_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@alone
def test_contestants_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []

    def contestant(name: str) -> Contestant:
        def work(box: list[Any]) -> tuple[Any, Any]:
            calls.append(box.pop())
            return None, 2.0

        return Contestant(name, lambda: name, work)

    series = interleave([contestant("a"), contestant("b")], 3, truth=1.6)
    assert "".join(calls) == "abbaabba"
    assert [len(measured.seconds) for measured in series] == [3, 3]
    assert series[0].error == pytest.approx(0.25)


@alone
def test_the_table_compares_with_distclip() -> None:
    series = [
        Series("distclip", False, [0.002], error=1e-8, peak_bytes=2_000_000),
        Series("MLX", False, [0.010]),
        Series("torch, 1 thread", False, [0.006]),
        Series("torch, 2 threads", False, [0.004]),
        Series("plain read, 1 thread", True, [0.001]),
    ]
    result = Result(
        part="norm", case="norm", tree="1 x 8 MB", dtype="float32", bytes=8_000_000, values=2_000_000, series=series
    )
    assert "distclip                  2.000        1.00    4.00     25%  1.0e-08" in table(result)
    assert "MLX                      10.000        5.00    0.80\n" in table(result)
    assert summary(result) == [
        "distclip: 2.00 of a plain read, 1 thread",
        "distclip: 5.0 x as fast as MLX, 2.0 x as fast as torch",
        "1.000 ns per value",
    ]


@alone
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_gradients_are_what_their_norm_says(dtype: str) -> None:
    grads = Grads([(300, 7), (5,)], [dtype] * 2)
    assert [(x.shape, str(x.dtype)) for x in grads.fresh_mlx()] == [
        ((300, 7), f"mlx.core.{dtype}"),
        ((5,), f"mlx.core.{dtype}"),
    ]
    assert relative(grads.norm, norm64(grads.mlx)) < 1e-12
    assert grads.bytes == sum(x.nbytes for x in grads.mlx)
    other = Grads([(300, 7), (5,)], [dtype] * 2, seed=1)
    ranks = [grads, other]
    flat = [np.concatenate([np.array(x.astype(mx.float32)).reshape(-1) for x in rank.mlx]) for rank in ranks]
    mean = np.mean(np.array(flat, np.float64), axis=0)
    assert relative(average_norm(ranks), math.sqrt(float(mean @ mean))) < 1e-12


@alone
def test_the_transformer_is_that_of_half_a_billion_parameters() -> None:
    assert sum(math.prod(shape) for shape in qwen()) == 494_032_768
    assert [tree.name for tree in trees(256, transformer=True)][::6] == ["1 x 256 MB", "0.5 B transformer"]


@alone
def test_lora_has_two_factors_for_each_matrix_of_a_layer() -> None:
    shapes = lora(8)
    assert len(shapes) == 24 * 7 * 2
    assert shapes[:4] == [(896, 8), (8, 896), (896, 8), (8, 128)]
