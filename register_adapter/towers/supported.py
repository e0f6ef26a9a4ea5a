"""The tables of supported models, from the registry: what documents show and ``register-adapter families`` prints."""

from __future__ import annotations

from pathlib import Path

from ..utils.files import read_text
from ..utils.staging import write_text
from .anatomy import Anatomy
from .families import FAMILIES
from .libraries import STACKS
from .tower import ROWS

__all__ = ["END", "START", "full_table", "short_table", "write_table"]

#: Lines between which a document holds a table.
START, END = "<!-- families: made by `make families` -->", "<!-- /families -->"

_LIBRARIES = {"timm": "timm", "open_clip": "OpenCLIP", "torchvision": "torchvision"}


def short_table() -> str:
    """A Markdown table, one line a library, with the families of its vision towers."""
    towers = {"Hugging Face transformers": sorted({anatomy.family for anatomy in FAMILIES.values()})}
    for key in STACKS:
        package, _, name = key.rpartition(".")
        towers.setdefault(_LIBRARIES.get(package, "DINOv2's own code (torch.hub)"), []).append(f"`{name}`")
    lines = ["| library | families of vision towers |", "| --- | --- |"]
    lines += [f"| {library} | {', '.join(names)} |" for library, names in towers.items()]
    return "\n".join([*lines, "| plain PyTorch | any ViT with global attention, described by an `Anatomy` |"])


def full_table() -> str:
    """A Markdown table, one line a family: classes, tokens before the registers, where these enter and leave."""
    rows: dict[str, tuple[Anatomy, list[str]]] = {}
    for name, anatomy in ROWS.items():
        rows.setdefault(anatomy.family, (anatomy, []))[1].append(name)
    lines = [
        "| family | vision towers | tokens before them | registers enter | and leave |",
        "| --- | --- | --- | --- | --- |",
    ]
    for family, (anatomy, names) in sorted(rows.items()):
        enter = f"{anatomy.insert_at} of `{_first(anatomy.embeddings)}`"
        leave = f"{anatomy.remove_from} of `{_first(anatomy.remove)}`"
        towers = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {family} | {towers} | {_prefix(anatomy)} | {enter} | {leave} |")
    return "\n".join(lines)


def write_table(path: str | Path, table: str) -> None:
    """Put a table into a document, between the lines :data:`START` and :data:`END`.

    Raises:
        OSError: It cannot be read or written; what was there before is untouched.
        ValueError: The document lacks one of the lines.
    """
    text = read_text(path)
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{path} has no place for the table: it needs the lines {START!r} and {END!r}")
    write_text(path, f"{before}{start}\n{table}\n{end}{after}")


def _first(paths: str | tuple[str, ...]) -> str:
    return paths if isinstance(paths, str) else paths[0]


def _prefix(anatomy: Anatomy) -> str:
    parts = [str(anatomy.prefix)] if anatomy.prefix or not anatomy.native_registers else []
    parts += [f"`{_first(anatomy.native_registers)}`"] if anatomy.native_registers else []
    return " + ".join(parts)
