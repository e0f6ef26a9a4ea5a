"""Names that somebody else chose, as text that can be shown and written anywhere."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "first_few",
    "one_line",
    "path_text",
    "printable",
    "shortened",
    "size_text",
    "where_it_is",
    "without_password",
]

#: Controls, formats (among them what turns the direction of writing), halves of surrogate pairs, line separators.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_SHOWN = 20
#: A user name and a password in an address, which loses a slash where it is taken for a path.
_LOGIN = re.compile(r"(?<=:/)(/?)[^/\s:@]*:[^/\s@]+@")


def printable(text: object, keep: str = "") -> str:
    r"""Text in which every character shows, so that a name can neither control a terminal nor end a line.

    Args:
        text: Any text, or what becomes one by ``str``.
        keep: Characters to leave alone, such as ``"\n"``.

    Returns:
        The text with ``\x1b`` for an escape, ``\n`` for the end of a line, ``\xe9`` for a byte that is not UTF-8. It
        can be encoded in UTF-8.
    """
    text = str(text)
    if text.isprintable():
        return text
    safe = (char in keep or unicodedata.category(char) not in _UNSAFE for char in text)
    return "".join(char if shown else _escaped(char) for char, shown in zip(text, safe, strict=True))


def one_line(text: object, most: int = 500) -> str:
    """What somebody else wrote, or an error that quotes it: printable, in one line, and cut where it is too long."""
    line = printable(text)
    return line if len(line) <= most else f"{line[:most]}…"


def shortened(text: str, most: int = 4000) -> str:
    """A message without its end where it quotes a file at length, with the number of characters that it had."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters in all)"


def without_password(text: str) -> str:
    """Text in which addresses such as ``https://user:password@host`` have neither."""
    return _LOGIN.sub(r"\1", text)


def path_text(path: str | os.PathLike[str]) -> str:
    """A path as text in UTF-8 that leads to the same file: itself, or a ``file://`` address if it is not UTF-8."""
    text = os.fspath(path)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Path(text).absolute().as_uri()
    return text


def first_few(lines: Sequence[str]) -> str:
    """The first twenty lines as one, and how many more there are."""
    rest = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + rest


def size_text(nbytes: float) -> str:
    """A number of bytes for people, such as ``"64.5 kB"``."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def where_it_is(adapter: str) -> str:
    """What stands behind a line of code that loads an adapter by the bare name of its folder; else nothing."""
    return "" if "/" in adapter else "  # a local folder: put its path here, or the name of this repository"
