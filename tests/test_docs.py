"""The documentation is true: its programs run, its links lead somewhere, and every public name is in it.

Every ```python block of README.md and docs/**/*.md is a whole program. ``<!-- run: 1 2 4 -->`` on the line before gives
the numbers of ranks (1, also without a comment: plain python; else mpirun). A ```text block right after it is rank 0's
output. ``<!-- run: 2 with mlx 0.32.4 -->``: the output is that of these versions of packages, on x86-64 Linux; with
others the program runs, and may print something else. A ```py block is a part of a file, or a program that does not end
well: ``<!-- append: FILE -->`` on the line before names the file.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import platform
import pydoc
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from launching import alone, launch, under_mpirun

import distclip
from distclip.openmpi import find_libmpi

pytestmark = pytest.mark.launches

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = re.compile(r"<!-- run:((?: \d+)+)(?: with((?: [\w-]+ [\d.]+)+))? -->")
DEVELOPMENT = ROOT / "docs/reference/development.md"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int  # of its first fence, from 1
    end: int  # of its last fence
    language: str
    text: str


@dataclass(frozen=True)
class Program:
    """A block that runs.

    Attributes:
        ranks: how many run it.
        output: of rank 0; None where the page does not give it, or gives that of other versions.
        of_mlx: a report on MLX itself, which does not look for Open MPI as distclip does.
    """

    block: Block
    ranks: int
    output: str | None
    of_mlx: bool

    def __str__(self) -> str:
        return f"{self.block.page.name}:{self.block.line}-{self.ranks}"


def blocks_of(page: Path) -> list[Block]:
    blocks: list[Block] = []
    opened: int | None = None
    language = ""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened, language = number, line.removeprefix("```").strip()
        else:
            blocks.append(Block(page, opened, number, language, "\n".join(lines[opened : number - 1]) + "\n"))
            opened = None
    assert opened is None, f"{page.name}:{opened}: the block does not end"
    return blocks


def comment_on(block: Block) -> str:
    """The line before a block."""
    return block.page.read_text().splitlines()[block.line - 2].strip() if block.line > 1 else ""


def programs() -> Iterator[Program]:
    for page in PAGES:
        lines, blocks = page.read_text().splitlines(), blocks_of(page)
        for i, block in enumerate(blocks):
            if block.language != "python":
                continue
            run = RUN.fullmatch(comment_on(block))
            after = blocks[i + 1] if i + 1 < len(blocks) else None
            follows = after is not None and after.language == "text" and not "".join(lines[block.end : after.line - 1])
            versions = run[2] if run else None
            output = after.text if after is not None and follows and is_as_written(versions or "") else None
            for ranks in run[1].split() if run else ["1"]:
                yield Program(block, int(ranks), output, of_mlx=versions is not None)


def is_as_written(versions: str) -> bool:
    """Whether the packages have the versions in a text like ``"mlx 0.32.4 mlx-lm 0.32.2"``; true for an empty text."""
    words = versions.split()
    if words and (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False
    return all(version(name) == wanted for name, wanted in zip(words[::2], words[1::2], strict=True))


def prose(page: Path) -> str:
    """A page without its fenced blocks and comments."""
    lines = page.read_text().splitlines()
    for block in blocks_of(page):
        lines[block.line - 1 : block.end] = [""] * (block.end - block.line + 1)
    return re.sub(r"<!--.*?-->", "", "\n".join(lines), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    names: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        base = anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = 0
        while anchor in names:
            count += 1
            anchor = f"{base}-{count}"
        names.add(anchor)
    return names


@pytest.mark.parametrize("program", list(programs()), ids=str)
def test_the_program_runs_and_prints_what_the_page_says(program: Program, tmp_path: Path) -> None:
    block, n = program.block, program.ranks
    variables: dict[str, Any] = {"MLX_MPI_LIBNAME": str(find_libmpi())} if program.of_mlx else {}
    ended = alone(block.text, tmp_path) if n == 1 else under_mpirun(n, block.text, tmp_path, **variables)
    where = f"{block.page.name}:{block.line} with {n} rank(s)"
    assert ended.code == 0, f"{where} ended with exit code {ended.code}:\n{ended.output}"
    if program.output is not None:
        assert ended.output.strip() == program.output.strip(), where


def test_an_output_is_compared_for_the_versions_that_it_names() -> None:
    here = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    assert is_as_written("")
    assert is_as_written(f"mlx {version('mlx')} numpy {version('numpy')}") is here
    assert not is_as_written(f"mlx {version('mlx')} numpy 0.1")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_image_leads_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "code", prose(page))
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=[\"']([^\"']+)", text)
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if (
            not target.is_relative_to(ROOT)
            or not target.exists()
            or (anchor and target.suffix == ".md" and anchor not in anchors(target))
        ):
            broken.append(link)
    assert not broken, f"{page.name} has links that lead nowhere: {', '.join(broken)}"


def test_the_examples_of_the_docstrings_are_true() -> None:
    tried = 0
    for module in pkgutil.walk_packages(distclip.__path__, "distclip."):
        if module.name.rpartition(".")[2].startswith(("__main__", "find_mlx", "mlx_")):  # programs, the kernel, mlx-lm
            continue
        results = doctest.testmod(importlib.import_module(module.name))
        assert results.failed == 0, f"{module.name}: {results.failed} examples failed, see the output above"
        tried += results.attempted
    assert tried > 0


def test_every_public_name_is_documented() -> None:
    words = set(re.findall(r"\w+", (ROOT / "docs/index.md").read_text()))
    names = set(distclip.__all__)
    assert names
    assert names <= words, f"docs/index.md does not mention {', '.join(sorted(names - words))}"


def shown_by_the_api_page() -> dict[str, list[str]]:
    """What docs/reference/api.md shows, by its full name: the members that it shows of each."""
    text = (ROOT / "docs/reference/api.md").read_text()
    shown = re.findall(r"^::: (\S+)\n(?:    options:\n      members: \[(.*)\]\n)?", text, re.MULTILINE)
    return {name: members.split(", ") if members else [] for name, members in shown}


def test_the_api_page_shows_every_public_name() -> None:
    missing = {f"distclip.{name}" for name in distclip.__all__} - set(shown_by_the_api_page())
    assert not missing, f"docs/reference/api.md does not show {', '.join(sorted(missing))}"


@pytest.mark.parametrize("name", shown_by_the_api_page())
def test_what_the_api_page_shows_has_a_docstring(name: str) -> None:
    shown = pydoc.locate(name)
    assert shown is not None, f"there is no {name}"
    parts = {name: shown} | {m: inspect.getattr_static(shown, m) for m in shown_by_the_api_page()[name]}
    for called, part in parts.items():
        doc = part.__doc__ or ""
        if doc.startswith(f"{called.rpartition('.')[2]}("):  # what a dataclass without one gets
            doc = ""
        assert doc, f"{name}: {called} has no docstring"


def test_the_package_shows_its_public_names_alone() -> None:
    assert sorted(dir(distclip)) == sorted([*distclip.__all__, "__version__"])
    assert all(getattr(distclip, name).__name__ == name for name in distclip.__all__)
    with pytest.raises(AttributeError, match="no attribute 'clip_grads'"):
        distclip.clip_grads  # noqa: B018


# ------------------------------------------------------------------------------------- docs/reference/development.md


def test_the_rule_of_the_worked_example_passes_its_test(tmp_path: Path) -> None:
    parts = {comment_on(block): block.text for block in blocks_of(DEVELOPMENT) if block.language == "py"}
    rule, test = parts["<!-- append: distclip/thresholds.py -->"], parts["<!-- append: tests/test_thresholds.py -->"]
    line = "from distclip.thresholds import MeanClip"
    assert f"`{line}`" in DEVELOPMENT.read_text()
    for file in (*ROOT.glob("tests/*.py"), ROOT / "pyproject.toml"):
        shutil.copy(file, tmp_path)
    # The module as it would be with the rule at its end.
    append = f"import distclip.thresholds\nexec({rule!r}, vars(distclip.thresholds))\nimport distclip as dc\n{line}\n"
    before = (ROOT / "tests/test_thresholds.py").read_text()
    (tmp_path / "test_rule.py").write_text(before.replace("import distclip as dc\n", append, 1) + f"\n\n{test}")
    command = [sys.executable, "-m", "pytest", "-q", "test_rule.py", "-k", "mean_clip"]
    ended = launch(command, tmp_path, {"DISTCLIP_TEST_MARKS": str(tmp_path)})
    assert ended.code == 0, ended.output
    assert "2 passed" in ended.output


def test_the_layers_are_those_that_are_checked() -> None:
    (drawn,) = (block.text for block in blocks_of(DEVELOPMENT) if comment_on(block) == "<!-- layers -->")
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert contract
    assert [re.split(r"  +", line)[0] for line in drawn.splitlines()] == re.findall(r'"(.+?)"', contract[1])


def test_the_table_of_modules_names_every_module_and_test() -> None:
    text = DEVELOPMENT.read_text()
    modules = {str(path.relative_to(ROOT / "distclip")) for path in (ROOT / "distclip").rglob("*.py")}
    modules = {name for name in modules if not re.match(r"bench/|engine/native/|\w+/__init__", name)}
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [name for name in sorted(modules | tests) if f"`{name}`" not in text]
    assert not missing, f"docs/reference/development.md does not name {', '.join(missing)}"
    gone = [name for name in re.findall(r"`(tests/[\w/]+\.\w+)`", text) if not (ROOT / name).exists()]
    assert not gone, f"docs/reference/development.md names {', '.join(gone)}, which is gone"
