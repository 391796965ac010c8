"""What is handed out: a source distribution with everything that a clone has, and a wheel with what runs.

`.ci/run packages` builds and installs both as a user does; these tests build the wheel without the kernel, as where
there is no compiler.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from launching import BIN, Ended, launch
from packaging.metadata import Metadata

pytestmark = pytest.mark.launches

ROOT = Path(__file__).parent.parent
in_a_clone = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with the files that git has")
SITE = next(part for part in sys.path if part.endswith("site-packages"))
BUILD = "from scikit_build_core.build import build_{0}; build_{0}({1!r}, {{'wheel.cmake': {2!r}}})"


def build(kind: str, source: Path, folder: Path, cmake: str = "false") -> Path:
    """Build a package of a source tree, as pip would."""
    ended = launch([sys.executable, "-c", BUILD.format(kind, str(folder), cmake)], source)
    assert ended.code == 0, ended.output
    (package,) = folder.iterdir()
    return package


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the source distribution."""
    source = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(source)
    (tree,) = source.iterdir()
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel; MLX and Open MPI are those of this one."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "bin/python")]
    ended = launch([*pip, "install", "--no-deps", "--no-index", str(wheel)], folder)
    assert ended.code == 0, ended.output
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(f"{SITE}\n")
    return folder / "bin/python"


def run(python: Path, folder: Path, *arguments: str) -> Ended:
    return launch([str(python), *arguments], folder, {"PATH": f"{BIN}:/usr/bin:/bin", "DISTCLIP_ENGINE": ""})


def tracked(*folders: str) -> set[str]:
    files = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return set(files.split())


@in_a_clone
def test_the_source_distribution_is_the_clone(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    every = tracked()
    assert {"launch/train.py", "docs/index.md", "tests/run.sh", "distclip/engine/native/bindings.cpp"} <= every
    assert every - names == set()
    assert {name for name in names - every if not (ROOT / name).exists()} == {"PKG-INFO"}


@in_a_clone
def test_the_wheel_has_what_runs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    runs = {name for name in tracked("distclip") if name.endswith((".py", "py.typed")) or "/gpu/" in name}
    assert any(name.endswith("gpu/metal.h") for name in runs)
    assert names == runs - {"distclip/engine/native/find_mlx.py"}


def test_what_an_index_shows_has_no_link_that_leads_nowhere(sdist: Path, wheel: Path) -> None:
    with tarfile.open(sdist) as archive, zipfile.ZipFile(wheel) as zipped:
        (of_sdist,) = [file for file in archive if file.name.count("/") == 1 and file.name.endswith("/PKG-INFO")]
        stream = archive.extractfile(of_sdist)
        assert stream
        texts = [stream.read()]
        texts += [zipped.read(name) for name in zipped.namelist() if name.endswith(".dist-info/METADATA")]
    for text in texts:
        metadata = Metadata.from_email(text, validate=True)
        assert metadata.description
        assert metadata.description.startswith("# distclip\n")
        links = re.findall(r"\]\(\s*([^)\s]+)|(?:src|href)=[\"']([^\"']+)", metadata.description)
        assert [link for link in links if not any(re.match(r"[a-z]+:", part) for part in link)] == []
        assert "<!--" not in metadata.description


@in_a_clone
def test_nobody_is_told_to_install_a_name_that_no_index_has() -> None:
    advice = re.compile(r"pip install [^\n`]*(?<![/\w.])distclip(?![/\w])")
    told = [name for name in tracked() if advice.search((ROOT / name).read_text(errors="ignore"))]
    assert told == []


def test_the_wheel_works_elsewhere(python: Path, tmp_path: Path) -> None:
    program = "import distclip as dc, mlx.core as mx; print(dc.__file__, dc.global_norm({'w': mx.array([3.0, 4.0])}))"
    ended = run(python, tmp_path, "-c", program)
    assert ended.code == 0, ended.output
    assert ended.output.startswith(str(python.parent.parent))
    assert ended.output.endswith("array(5, dtype=float32)\n")
    assert run(python, tmp_path, "-m", "distclip", "--version").output == f"distclip {version('distclip')}\n"


def test_without_a_kernel_the_doctor_says_slower(python: Path, tmp_path: Path) -> None:
    ended = run(python, tmp_path, "-m", "distclip", "doctor")
    assert ended.code == 0, ended.output
    assert re.search(r"^slower  kernel .*MLX operations .*slower: no kernel was built$", ended.output, re.MULTILINE)
