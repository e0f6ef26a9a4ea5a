"""What a command prints: tables for people or JSON for programs, and no messages of other libraries."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import typer

__all__ = ["print_result", "silence_libraries"]


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
    logging.disable_progress_bar()
    if quiet:
        disable_progress_bars()
