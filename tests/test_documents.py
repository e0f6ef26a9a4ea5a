"""The documents: links lead somewhere, code can be read, the README is short, and the API reference is complete."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
import re
import textwrap
from pathlib import Path

import pytest

import register_adapter

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
API = ROOT / "docs" / "api"
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", ".github/*.md", "docs/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
#: Modules whose public names the API reference has: the package, and the face of every package in it.
FACES = (
    "register_adapter",
    *(f"register_adapter.{module.name}" for module in pkgutil.iter_modules(register_adapter.__path__) if module.ispkg),
)
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)


def _text(document: str) -> str:
    return (ROOT / document).read_text("utf-8")


def _blocks(text: str, language: str) -> list[str]:
    return [code for name, code in _FENCE.findall(text) if name == language]


# Links


@functools.cache
def _prose(path: Path) -> str:
    """A document without its code: neither blocks, nor what stands between backticks."""
    text = _FENCE.sub("", path.read_text("utf-8"))
    return re.sub(r"`[^`\n]*`", "``", re.sub(r"(?m)^(?: {4}|\t)(?![ \t]*[-*\d]).*$", "", text))


@functools.cache
def _anchors(path: Path) -> set[str]:
    """Anchors of a document's headings as GitHub makes them, and those that mkdocstrings makes of ``:::`` lines."""
    text = _FENCE.sub("", path.read_text("utf-8"))
    anchors: set[str] = set()
    for heading in re.findall(r"(?m)^#{1,6} +(.+?) *#*$", text):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        copies = [slug, *(f"{slug}-{number}" for number in range(1, 99))]
        anchors.add(next(anchor for anchor in copies if anchor not in anchors))
    for module, options in re.findall(r"(?m)^::: (\S+)\n((?:[ \t].*\n|\n(?=[ \t]))*)", text):
        anchors |= {module, *(f"{module}.{name}" for name in re.findall(r"(?m)^ {8}- (\w+)$", options))}
    return anchors


def _links(path: Path) -> list[str]:
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", _prose(path))
    return inline + re.findall(r"(?m)^\[[^\]]+\]: *(\S+)", _prose(path))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_to_files_and_headings(document: str) -> None:
    path = ROOT / document
    for link in _links(path):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert not link.startswith("/"), f"{document}: {link} is absolute"
        assert target.exists(), f"{document}: nothing at {link}"
        assert target.is_relative_to(ROOT), f"{document}: {link} lies outside the repository"
        if anchor:
            assert anchor in _anchors(target), f"{document}: no heading for {link}"


def test_the_links_are_found() -> None:
    """The test above would pass on documents without links."""
    assert {"docs/audit.md", "docs/images/grown.png", "LICENSE"} <= set(_links(README))
    assert "rules" in _anchors(ROOT / "docs" / "audit.md")
    assert "register_adapter.tuner.add_registers" in _anchors(API / "tuner.md")


def test_no_document_of_the_site_links_out_of_it() -> None:
    """mkdocs has no page for a file outside of docs/; use an address there."""
    outside = [
        (path.name, link)
        for path in (ROOT / "docs").rglob("*.md")
        for link in _links(path)
        if not re.match(r"[a-z]+:|#", link)
        and not (path.parent / link.partition("#")[0]).resolve().is_relative_to(ROOT / "docs")
    ]
    assert not outside


# Code


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if "```python" in _text(name)])
def test_python_blocks_can_be_parsed(document: str) -> None:
    for code in _blocks(_text(document), "python"):
        ast.parse(textwrap.dedent(code), filename=document)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if "```python" in _text(name)])
def test_names_that_python_blocks_import_from_the_package_exist(document: str) -> None:
    for code in _blocks(_text(document), "python"):
        for node in ast.walk(ast.parse(textwrap.dedent(code))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "register_adapter":
                module = importlib.import_module(node.module or "")
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{document}: {node.module} has no {missing}"


# The README


def test_the_readme_is_short() -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 120
    quickstart = text.partition("\n## Quickstart\n")[2].partition("\n## ")[0]
    code = "".join(code for _, code in _FENCE.findall(quickstart))
    assert 0 < len([line for line in code.splitlines() if line.strip()]) <= 20


# The API reference


@pytest.mark.parametrize("face", FACES)
def test_the_api_reference_has_every_public_name(face: str) -> None:
    names = set(importlib.import_module(face).__all__)
    page = API / ("index.md" if face == "register_adapter" else f"{face.rpartition('.')[2]}.md")
    assert page.is_file(), f"docs/api/{page.name} is missing: it lists the names of {face}"
    missing = names - _listed(page)
    assert not missing, f"docs/api/{page.name} does not have {sorted(missing)} of {face}"


@pytest.mark.parametrize("page", sorted(path.name for path in API.glob("*.md")))
def test_the_api_reference_has_no_name_that_is_gone(page: str) -> None:
    text = (API / page).read_text("utf-8")
    modules = re.findall(r"(?m)^::: (\S+)$", text) or ["register_adapter"]
    names = {name for module in modules for name in dir(importlib.import_module(module))}
    gone = _listed(API / page) - names
    assert not gone, f"docs/api/{page} lists {sorted(gone)}, which {modules} do not have"


def test_the_site_has_every_document() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r": (\S+\.md)$", nav, re.M)) == pages


def _listed(page: Path) -> set[str]:
    """Names that a page of the reference lists: members of a module, or rows of the table."""
    text = page.read_text("utf-8")
    return set(re.findall(r"(?m)^ {8}- (\w+)$", text)) | set(re.findall(r"(?m)^\| `(\w+)` \|", text))
