"""The command line where MLX is missing, or raises an error when it is imported: what needs no MLX runs as always."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from launching import BIN, Ended, launch

from distclip.records.read import KIND

pytestmark = pytest.mark.launches

SITE = Path(*[part for part in sys.path if part.endswith("site-packages")][:1])
ERROR = "libmlx.so: cannot open shared object file"


@dataclass(frozen=True)
class Python:
    """A Python whose MLX is missing or broken, and the error of its import."""

    path: Path
    error: str
    variables: dict[str, str] = field(default_factory=dict)

    def distclip(self, folder: Path, *arguments: str) -> Ended:
        command = [str(self.path), "-m", "distclip", *arguments]
        ended = launch(command, folder, {"PATH": f"{BIN}:/usr/bin:/bin", **self.variables})
        assert "Traceback" not in ended.output, ended.output
        return ended


@pytest.fixture(scope="module", params=["missing", "broken"])
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Python:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "broken":
        (folder / "mlx").mkdir()
        (folder / "mlx/__init__.py").write_text(f"raise ImportError({ERROR!r})\n")
        return Python(Path(sys.executable), ERROR, {"PYTHONPATH": str(folder)})
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    (site,) = folder.glob("lib/python*/site-packages")
    for entry in SITE.iterdir():
        if not entry.name.startswith("mlx"):
            (site / entry.name).symlink_to(entry)
    return Python(folder / "bin/python", "No module named 'mlx'")


@pytest.mark.parametrize(
    "options", ["--help", "--version", "doctor --help", "launch --help", "run --help", "bench --help", "report --help"]
)
def test_help(options: str, python: Python, tmp_path: Path) -> None:
    ended = python.distclip(tmp_path, *options.split())
    assert ended.code == 0, ended.output
    assert ended.output.startswith("distclip 0." if options == "--version" else "usage: distclip ")


def test_launch_dry_run(python: Python, tmp_path: Path) -> None:
    ended = python.distclip(tmp_path, "launch", "--hosts", "a,b", "--dry-run", "train.py", "--steps", "5")
    assert ended.code == 0, ended.output
    assert ended.output.startswith(f"{BIN}/mpirun ")
    assert ended.output.endswith(f" {python.path} train.py --steps 5\n")


def test_report(python: Python, tmp_path: Path) -> None:
    lines = [{"kind": KIND, "format": 1, "every": 1}, *({"step": i, "norm": 1.0, "threshold": 2.0} for i in (1, 2))]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = python.distclip(tmp_path, "report", "run.jsonl", "--output", "report.html")
    assert ended.code == 0, ended.output
    assert "<html" in (tmp_path / "report.html").read_text()


def test_doctor_says_how_to_mend_mlx(python: Python, tmp_path: Path) -> None:
    ended = python.distclip(tmp_path, "doctor", "--json", "doctor.json")
    assert ended.code == 1, ended.output
    (failure,) = [entry for entry in json.loads((tmp_path / "doctor.json").read_text())["findings"] if not entry["ok"]]
    assert failure["check"] == "mlx"
    assert python.error in failure["found"]
    assert f"{python.path} -m pip install --force-reinstall 'mlx" in failure["remedy"]
    assert f"      -> {failure['remedy']}\n" in ended.output


@pytest.mark.parametrize("options", [(), ("--quick",)])
def test_bench_ends_with_one_sentence(options: tuple[str, ...], python: Python, tmp_path: Path) -> None:
    ended = python.distclip(tmp_path, "bench", *options)
    assert ended.code == 1
    assert ended.output == f"distclip bench cannot start: {python.error}; `distclip doctor` says what to do\n"


def test_run_ends_with_one_sentence(python: Python, tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    ended = python.distclip(tmp_path, "run", "train.py")
    assert ended.code == 1
    assert ended.output == f"distclip run cannot start: {python.error}; `distclip doctor` says what to do\n"


@pytest.mark.parametrize("arguments", [["launch", "--hosts", "a,b", "--dry-run", "train.py"], ["doctor"]])
def test_mlx_is_not_imported(arguments: list[str], tmp_path: Path) -> None:
    program = (
        f"import sys; from distclip.cli import main; assert main({arguments}) == 0; assert 'mlx' not in sys.modules"
    )
    ended = launch([sys.executable, "-c", program], tmp_path)
    assert ended.code == 0, ended.output
