"""A study as one HTML page: what to do, the arms side by side, images before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...artifacts.report import ArtifactReport
from ...utils.staging import write_text
from ..examples import Example
from .document import image_section, report_card
from .frame import environment_block, page_text, section
from .markup import Markup, element
from .tables import Table, show_table

__all__ = ["StudyPage", "write_study_page"]

_SIGNS = {"good": "✓", "warn": "→", "bad": "▲"}


class StudyPage(NamedTuple):
    """What the page shows.

    Attributes:
        title: Heading of the page.
        lead: What stands below it.
        kind: Whether what is recommended is to leave the model (``"good"``), a repair (``"warn"``), or nothing
            (``"bad"``).
        headline: What is recommended.
        reasons: Why, in sentences.
        commands: Command lines that follow.
        reports: The audit of the model, and of the recommended arm.
        tables: Figures of the arms, and what the rule says of them.
        examples: A few images under the model, and under the arm.
        definitions: Of the figures.
        settings: Settings, versions, hardware.
    """

    title: str
    lead: Sequence[str]
    kind: str
    headline: str
    reasons: Sequence[str]
    commands: Sequence[str]
    reports: Sequence[ArtifactReport]
    tables: Sequence[Table]
    examples: Sequence[Example]
    definitions: Mapping[str, str]
    settings: Mapping[str, Any]


def write_study_page(path: str | Path, page: StudyPage) -> Path:
    """Write a study as one self-contained HTML page, see :func:`register_adapter.viz.write_page`.

    Args:
        path: File to write; folders above it are made.
        page: What it shows.

    Returns:
        The path of the file.
    """
    sections = [
        section("do", "What to do", _recommended(page)),
        section("verdict", "Verdict", element("div", map(report_card, page.reports), class_="cards")),
    ]
    links = [("do", "What to do"), ("verdict", "Verdict")]
    if page.examples:
        sections.append(image_section(page.examples))
        links.append(("images", "Images"))
    listed = [element("div", element("dt", name), element("dd", words)) for name, words in page.definitions.items()]
    sections += [
        section("arms", "Arms", map(show_table, page.tables)),
        section("definitions", "Definitions", element("dl", listed, class_="definitions")),
    ]
    links += [("arms", "Arms"), ("definitions", "Definitions")]
    footer = environment_block("Settings", page.settings)
    write_text(path, page_text(page.title, page.lead, links, sections, footer))
    return Path(path)


def _recommended(page: StudyPage) -> Markup:
    sign = element("span", _SIGNS[page.kind], aria_hidden="true")
    words = page.headline[:1].upper() + page.headline[1:]
    commands = [element("pre", element("code", command), tabindex=0) for command in page.commands]
    heading = element("h4", "The commands that follow") if commands else None
    return element(
        "article",
        element("p", sign, f" {words}", class_="badge"),
        [element("p", reason, class_="reason") for reason in page.reasons],
        element("div", heading, commands, class_="next") if commands else None,
        class_=f"card {page.kind}",
    )
