"""What MkDocs needs to show these pages as they are in the repository, see .mkdocs.yml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
API = ROOT / "docs/reference/api.md"
LINK = re.compile(r"(\]\()((?:\.\./)+[^)\s#]+)")
ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")


def _outside(link: str, page: Path) -> Path | None:
    """The file of the repository, outside docs/, that a page links to; None where the target is a page or an image."""
    target = (page.parent / link).resolve()
    return target if target.is_file() and not target.is_relative_to(ROOT / "docs") else None


def _source(file: Path) -> str:
    """The page that shows a file, as a path in docs/."""
    return f"source/{file.relative_to(ROOT)}.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that a page links to: the site has no repository beside it."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    links = [(page, link[2]) for page in pages for link in LINK.finditer(page.read_text())]
    for file in sorted({file for page, link in links if (file := _outside(link, page))}):
        language = {".py": "python", ".sh": "sh", ".toml": "toml"}.get(file.suffix, "text")
        text = f"# {file.relative_to(ROOT)}\n\n````{language}\n{file.read_text()}````\n"
        files.append(File.generated(config, _source(file), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Let links to such files lead to their pages."""
    if page.file.abs_src_path is None:
        return markdown
    here = Path(page.file.abs_src_path)
    up = "../" * (len(Path(page.file.src_uri).parts) - 1)

    def follow(link: re.Match[str]) -> str:
        file = _outside(link[2], here)
        return f"{link[1]}{up}{_source(file)}" if file else link[0]

    return LINK.sub(follow, markdown)


class Roles(griffe.Extension):
    """Docstrings name other objects as Sphinx does, :class:`distclip.Clipper`; here that is a link to the API page."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        _read(pkg, set(re.findall(r"^::: (\S+)", API.read_text(), re.MULTILINE)))


def _read(obj: griffe.Object, shown: set[str]) -> None:
    if obj.docstring:
        obj.docstring.value = ROLE.sub(lambda role: _reference(role[1], shown), obj.docstring.value)
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            _read(member, shown)


def _reference(name: str, shown: set[str]) -> str:
    """A link to an object that the API page shows, else its name as code."""
    target = name if name.startswith("distclip.") else f"distclip.{name}"
    return f"[`{name.removeprefix('distclip.')}`][{target}]" if target in shown else f"`{name}`"
