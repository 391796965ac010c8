"""The program that mypy and pyright check (`pre-commit run`) runs, and uses every public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import alone, under_mpirun

import distclip as dc

pytestmark = pytest.mark.launches

PROGRAM = Path(__file__).with_name("user_program.py")


def test_it_uses_every_public_name() -> None:
    used = set(re.findall(r"dc\.(\w+)", PROGRAM.read_text()))
    assert not {*dc.__all__, "__version__", "__all__"} - used


def test_it_runs_alone(tmp_path: Path) -> None:
    ended = alone(PROGRAM.read_text(), tmp_path)
    assert ended.code == 0, ended.output


def test_it_runs_on_two_ranks(tmp_path: Path) -> None:
    ended = under_mpirun(2, PROGRAM.read_text(), tmp_path)
    assert ended.code == 0, ended.output
