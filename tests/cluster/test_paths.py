"""Environments at any path: they work, or are refused before mpirun starts, with the remedy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launching import BIN, SHARE_CORES, launch

from cluster.lab import MPIRUN_ARGS, Lab

PATHS = ["My Disk", "$(touch made)", "a;touch made", "it's", "`touch made`", "\u00e9"]
PROGRAM = "import distclip as dc\nprint('rank', dc.init().rank)\n"


def options(prefix: Path) -> list[str]:
    return ["--python", str(prefix / "bin/python"), "--mpirun", str(prefix / "bin/mpirun")]


@pytest.mark.launches
@pytest.mark.parametrize("name", PATHS)
def test_any_path_works_on_this_machine(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "env").symlink_to(BIN.parent)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "distclip", "launch", "--hosts", "localhost:2", *options(tmp_path / name / "env")]
    ended = launch([*command, "program.py"], tmp_path, {"MPIRUN_ARGS": " ".join(SHARE_CORES[4:])})
    assert ended.code == 0, ended.output
    assert sorted(ended.output.splitlines()) == ["[0] rank 0", "[1] rank 1"]
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_a_shell_would_read_is_refused(name: str, lab: Lab) -> None:
    """And a link without such characters works."""
    (lab.shared / name).mkdir()
    strange, link = lab.shared / name / "env", lab.shared / "env"
    strange.symlink_to(BIN.parent)
    link.symlink_to(strange)
    (lab.shared / "program.py").write_text(PROGRAM)
    start = [sys.executable, "-m", "distclip", "launch", "--hosts", "h1,h2", "--cwd", str(lab.shared)]
    start += ["--interface", lab.subnet]
    ended = lab.on(1, [*start, *options(strange), "program.py"], limit_s=40, env={"MPIRUN_ARGS": MPIRUN_ARGS})
    assert ended.code == 1, ended.output
    assert "a shell on the other hosts would read" in ended.output
    assert "make a link without them, and name it: ln -s" in ended.output
    assert list(lab.shared.rglob("made")) == []
    ended = lab.on(1, [*start, *options(link), "program.py"], limit_s=40, env={"MPIRUN_ARGS": MPIRUN_ARGS})
    assert ended.code == 0, ended.output
    strange.unlink()
    link.unlink()
