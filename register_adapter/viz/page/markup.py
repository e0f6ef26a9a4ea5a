"""HTML and SVG from Python, in which every text is escaped unless it was made here."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from ...utils.text import printable

__all__ = ["Markup", "element", "join"]

_SPACES = "\n\t"
_VOID = {"img", "meta", "link", "br"}


class Markup(str):
    """Text that is markup already; any other text is escaped when it enters an element."""

    __slots__ = ()


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """One element.

    Args:
        tag: Its name.
        children: Markup, texts and numbers (escaped), iterables of them, ``None`` (left out).
        attributes: ``class_`` stands for ``class``, and ``_`` for ``-``. ``None`` and ``False`` leave an attribute out,
            ``True`` gives it no value; other values are escaped.
    """
    written = "".join(_attribute(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    return Markup(f"<{tag}{written}>" if tag in _VOID else f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: Any) -> Markup:
    """What :func:`element` makes of its children, without an element around it."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, Iterable) and not isinstance(children, str):
        return Markup("".join(join(child) for child in children))
    return Markup(escape(printable(children, keep=_SPACES)))


def _attribute(name: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(printable(value, keep=_SPACES))}"'
