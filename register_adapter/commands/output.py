"""What a command prints: tables for people or JSON for programs, and no messages of other libraries."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["collect_skipped", "echo", "make_console", "print_result", "print_skipped", "silence_libraries"]

#: Which logger names the images that were left out.
_LOGGER, _SHOWN = "register_adapter.data.batches", 20


def echo(text: str, *, err: bool = False) -> None:
    """Print a text that may hold names of files; nothing in it controls the terminal."""
    from ..utils.text import printable

    typer.echo(printable(text, keep="\n"), err=err)


def make_console() -> Console:
    """A console for texts with names of files and models: no markup, no emoji, no control characters from them."""
    from rich.console import Console
    from rich.text import Text

    from ..utils.text import printable

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text, keep="\n"), **options)

    return PlainConsole(markup=False, emoji=False)


@contextmanager
def collect_skipped() -> Iterator[list[str]]:
    """A list with a line for each image that is left out within, each once; no warning is printed of them."""
    lines: dict[str, None] = {}
    collected: list[str] = []
    logger = logging.getLogger(_LOGGER)

    def keep(record: logging.LogRecord) -> bool:
        lines.update(dict.fromkeys(getattr(record, "skipped", ())))
        collected[:] = lines
        return not hasattr(record, "skipped")

    logger.addFilter(keep)
    try:
        yield collected
    finally:
        logger.removeFilter(keep)


def print_skipped(lines: Sequence[str], whole_list: str | None) -> None:
    """Name the images that were left out, on the standard error.

    Args:
        lines: One for each: its name and what is wrong.
        whole_list: Where all of them are; ``None`` prints all.
    """
    if not lines:
        return
    shown = lines if whole_list is None else lines[:_SHOWN]
    echo("1 image is bad and skipped:" if len(lines) == 1 else f"{len(lines)} images are bad and skipped:", err=True)
    for line in shown:
        echo(f"  {line}", err=True)
    if len(shown) < len(lines):
        echo(f"  and {len(lines) - len(shown)} more; all are named in {whole_list}", err=True)


def print_result(result: Any, print_tables: Callable[[], None], *, as_json: bool, quiet: bool) -> None:
    """Print the result of a command on standard output.

    Args:
        result: What ``--json`` prints.
        print_tables: Prints the same for people.
        as_json: Print JSON, and nothing else.
        quiet: Print no tables.
    """
    if as_json:
        typer.echo(json.dumps(result, indent=1, allow_nan=False))
    elif not quiet:
        print_tables()


def silence_libraries(quiet: bool) -> None:
    """Turn off messages of other libraries that tell a user nothing, and with ``quiet`` the bars of downloads too."""
    from transformers.utils import logging

    from ..utils.progress import disable_progress_bars

    # PEFT reads an attribute that transformers has renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # Pillow's, of an image that is refused and named for the same reason.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    logging.disable_progress_bar()
    if quiet:
        disable_progress_bars()
