"""What every page has: the head with a policy that forbids to fetch anything, a header with links, a footer."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from .gallery import ramps
from .markup import Markup, element, join

__all__ = ["environment_block", "page_text", "section"]


def page_text(
    title: str, lead: Sequence[str], links: Sequence[tuple[str, str]], sections: Sequence[Markup], footer: Any
) -> str:
    """A whole page, with style and script inside.

    Args:
        title: Heading of the page.
        lead: What stands below it, with dots between.
        links: Names of sections, and the words that lead there.
        sections: What is shown, from :func:`section`.
        footer: What stands at the end.
    """
    style, script = (files(__package__).joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content="register-adapter"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(style + ramps())),
    )
    navigation = element("nav", [element("a", words, href=f"#{name}") for name, words in links], aria_label="Sections")
    header = element("header", element("h1", title), element("p", " · ".join(lead), class_="lead"), navigation)
    made = element("footer", element("p", "Made by register-adapter."), footer)
    body = element("body", header, element("main", sections), made, element("script", Markup(script)))
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def section(name: str, heading: str, *children: Any) -> Markup:
    """A section with a heading, which a link of the header leads to."""
    return element("section", element("h2", heading), *children, id=name)


def environment_block(summary: str, values: Mapping[str, Any]) -> Markup:
    """Nested settings or versions as pairs of a name and a value, folded away."""
    return element("details", element("summary", summary), element("p", join(_pairs(_flat(values)))))


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{name} {key}".strip())
    elif isinstance(values, list | tuple):
        yield name, f"{len(values)}: {', '.join(map(str, values[:20]))}{' …' if len(values) > 20 else ''}"
    elif values is not None:
        yield name, f"{values:.4g}" if isinstance(values, float) else str(values)


def _pairs(pairs: Iterator[tuple[str, str]]) -> Iterator[Markup]:
    for name, value in pairs:
        yield element("span", element("b", name), " ", value, class_="pair")
