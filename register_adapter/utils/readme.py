"""Reading and writing a README of the Hub's that may be somebody else's."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from re import Match, Pattern

import yaml  # type: ignore[import-untyped, unused-ignore]
from huggingface_hub import RepoCard

from .files import open_regular
from .staging import staged

__all__ = ["copy_readme", "find_block", "read_readme", "write_readme"]

logger = logging.getLogger(__name__)
#: Bytes, at most: far beyond any model card. What is longer would be read whole, and looked through again and again.
_MOST = 2**22


def copy_readme(folder: Path, scratch: Path) -> None:
    """Put the README of ``folder`` where files are written that will stand there.

    In the place of one that is no file but a folder or a pipe, may not be read, or is too long for a card, there is an
    empty folder, which nothing is moved from: :func:`read_readme` leaves it alone.
    """
    readme = folder / "README.md"
    if _is_short_file(readme):
        shutil.copyfile(readme, scratch / "README.md")
    elif readme.exists():
        (scratch / "README.md").mkdir()


def read_readme(path: Path) -> RepoCard | None:
    """A README, an empty one where there is none; ``None``, with a warning, for one that is to be left as it is.

    That is one that is no file, may not be read, is too long for a card, no UTF-8, or whose metadata cannot be read and
    written again: a save never fails because of it.
    """
    if not path.exists():
        return RepoCard("---\n\n---\n")
    if not _is_short_file(path):
        said = "%s is not a file of at most %d bytes that can be read, and is left as it is: no model card is written"
        logger.warning(said, path.name, _MOST)
        return None
    try:
        card: RepoCard = RepoCard.load(path)
        RepoCard(str(card))  # tuples, such as those of !!omap, are written in a way that nothing reads
        tags = card.data.get("tags")
        for tag in tags if isinstance(tags, list) else []:
            hash(tag)
        if not isinstance(tags, str | list | None):
            raise TypeError(f"its tags are no list but {tags!r:.100}")
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        logger.warning("%s is not a model card in UTF-8 with valid metadata and is left as it is: %s", path.name, told)
        return None
    return card


def _is_short_file(path: Path) -> bool:
    """Whether it is a file that may be read and is not too long for a card."""
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size <= _MOST
    except OSError:  # also of somebody else's file
        return False


def write_readme(card: RepoCard, path: Path) -> None:
    """Write it whole, or leave the one that is there.

    Raises:
        OSError: It cannot be written.
    """
    with staged(path.parent) as scratch:
        card.save(scratch / path.name)


def find_block(text: str, begin: str, head: Pattern[str], end: str) -> tuple[Match[str], int] | None:
    """The first generated part of a text; a marker whose partner was deleted never swallows what somebody wrote.

    Args:
        text: The text.
        begin: How each beginning starts.
        head: The whole of a beginning, at its place.
        end: The end's marker.

    Returns:
        The beginning, and the place behind the end.
    """
    start = 0
    while (stop := text.find(end, start)) >= 0:
        place = text.rfind(begin, start, stop)  # the last one before an end
        found = head.match(text, place, stop) if place >= 0 else None
        start = stop + len(end)
        if found:
            return found, start
    return None
