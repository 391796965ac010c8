"""``distclip run``: a program runs as under ``python``, and its optimizers clip."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launching import BIN, MPIRUN, SHARE_CORES, Ended, environment, launch

import distclip as dc

pytestmark = pytest.mark.launches

TRAINS = """
import json, math, os, sys
import mlx.core as mx, mlx.nn as nn
from mlx.optimizers import SGD
import helper

group = mx.distributed.init()
model, optimizer = nn.Linear(4, 1, bias=False), SGD(0.1)
model.weight = mx.zeros((1, 4))
state = [model.state, optimizer.state]


def loss(model, x):
    return (100 * model(x) - 1).square().sum()


def step(x):
    gradient = nn.value_and_grad(model, loss)(model, x)[1]
    optimizer.update(model, nn.average_gradients(gradient))


step = mx.compile(step, inputs=state, outputs=state)
for i in range(4):
    x = mx.full((4,), 1.0 + group.rank())
    step(x * math.nan if i == 1 and group.rank() == group.size() - 1 else x)
    mx.eval(state)
assert mx.all(mx.isfinite(model.weight)).item()
if "--raise" in sys.argv and group.rank() == 0:
    raise RuntimeError("of the program")
if "--exit" in sys.argv:
    sys.exit(int(sys.argv[-1]))
"""
SHOWS = """
import json, sys
import helper

main = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv, "first": sys.path[0], "name": __name__, "file": __file__, "is_main": vars(main) is globals(),
    "package": __package__, "spec": __spec__ and __spec__.name, "helper": helper.__file__,
}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With programs beside a module that they import, and an empty folder to be in."""
    (tmp_path / "programs/package").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name in ("trains", "shows"):
        for place in ("", "package/"):
            (tmp_path / f"programs/{place}{name}.py").write_text({"trains": TRAINS, "shows": SHOWS}[name])
    (tmp_path / "programs/helper.py").touch()
    return tmp_path


def run(folder: Path, *words: str, ranks: int = 0, inside: str = "programs") -> Ended:
    under = [str(MPIRUN), "-n", str(ranks), *SHARE_CORES] if ranks else []
    return launch([*under, str(BIN / "distclip"), "run", *words], folder / inside, limit_s=60)


@pytest.mark.parametrize(
    ("words", "inside"),
    [
        (["../programs/shows.py", "--max-norm", "7"], "empty"),
        (["shows.py", "-m", "x"], "programs"),
        (["-m", "shows", "a", "-b"], "programs"),
        (["-m", "package.shows"], "programs"),
    ],
)
def test_the_program_sees_what_python_shows_it(words: list[str], inside: str, folder: Path) -> None:
    expected = subprocess.run(
        [sys.executable, *words], cwd=folder / inside, env=environment(), capture_output=True, text=True, check=True
    ).stdout
    ended = run(folder, "--max-norm", "2", *words, inside=inside)
    assert ended.code == 0, ended.output
    shown, *told = ended.output.splitlines()
    assert json.loads(shown) == json.loads(expected)
    assert told == ["distclip: no optimizer of mlx.optimizers made a step here, so nothing was clipped"]


@pytest.mark.parametrize(
    ("program", "ranks"),
    [(["trains.py"], 0), (["trains.py"], 1), (["trains.py"], 3), (["-m", "package.trains"], 0), (["-m", "trains"], 2)],
)
def test_compiled_steps_are_clipped_and_guarded(program: list[str], ranks: int, folder: Path) -> None:
    ended = run(folder, "--record", "run.jsonl", "--max-norm", "0.5", *program, ranks=ranks)
    assert ended.code == 0, ended.output
    told = [line for line in ended.output.splitlines() if line.startswith("distclip:")]
    assert told[0] == "distclip: the norm of step 2 is nan; the step was skipped"
    assert told[1].startswith("distclip: 4 steps, 75% clipped, 1 skipped, last norm ")
    assert len(told) == 2
    record = dc.read_records(folder / "programs/run.jsonl")
    assert [step["skipped"] for step in record.steps] == [False, True, False, False]
    assert record.headers[0]["ranks"] == max(ranks, 1)
    assert record.headers[0]["config"] == {"program": " ".join(program[-1:]), "max_norm": 0.5, "nonfinite": "skip"}


@pytest.mark.parametrize("ranks", [0, 2])
def test_exit_codes_and_exceptions_pass_through(ranks: int, folder: Path) -> None:
    for code in (0, 3):
        ended = run(folder, "trains.py", "--exit", str(code), ranks=ranks)
        assert ended.code == code, ended.output
        assert ended.output.count("distclip: 4 steps, ") == 1
    ended = run(folder, "trains.py", "--raise", ranks=ranks)
    assert ended.code == 1
    assert "RuntimeError: of the program" in ended.output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--auto-clip", "50"], "1 skipped"),
        (["--zclip"], "1 skipped"),
        (["--max-norm", "0"], "0% clipped, 1 skipped"),
        (["--nonfinite", "zero"], "taken with zeros for gradients"),
        (["--skip-above", "1"], "above 1; the step was skipped"),
        (["--skip-above", "spike"], "1 skipped"),
    ],
    ids=" ".join,
)
def test_options(options: list[str], told: str, folder: Path) -> None:
    ended = run(folder, *options, "trains.py")
    assert ended.code == 0, ended.output
    assert told in ended.output


@pytest.mark.parametrize(("module", "ranks"), [("gone", 2), ("gone.inner", 0), ("package.gone", 0)])
def test_a_module_that_is_not_there_is_one_line(module: str, ranks: int, folder: Path) -> None:
    ended = run(folder, "-m", module, ranks=ranks)
    assert ended.code == 1
    assert f"distclip run: there is no module {module}" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name the program to run, after the options: -m MODULE, or a script"),
        (["gone.py"], "there is no script gone.py"),
        (["--record", "helper.py/run.jsonl", "trains.py"], "File exists: 'helper.py'"),
        (["--max-norm", "-1", "trains.py"], "argument --max-norm: should be between 0 and inf, not -1"),
        (["--max-norm", "1", "--zclip", "trains.py"], "argument --zclip: not allowed with argument --max-norm"),
        (["--skip-above", "9", "--nonfinite", "zero", "trains.py"], "--skip-above needs --nonfinite skip"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], told: str, folder: Path) -> None:
    ended = run(folder, *words)
    assert ended.code == 2
    assert ended.output.splitlines()[-1].endswith(told)


def test_an_error_in_the_options_is_said_by_one_rank(folder: Path) -> None:
    ended = run(folder, "gone.py", ranks=2)
    assert ended.code == 2
    assert ended.output.count("there is no script gone.py") == 1, ended.output


def test_a_program_in_a_zip_file_runs(folder: Path) -> None:
    with zipfile.ZipFile(folder / "programs/program.pyz", "w") as file:
        file.writestr("__main__.py", "import sys; print('in a zip file', sys.argv[1:])")
    ended = run(folder, "program.pyz", "a")
    assert ended.code == 0, ended.output
    assert "in a zip file ['a']" in ended.output
