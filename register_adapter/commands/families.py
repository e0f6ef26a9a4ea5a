"""The command ``register-adapter families``."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["families_command", "register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("families")(families_command)


def families_command(
    full: Annotated[
        bool, typer.Option("--full", help="One line per family, with where registers enter and leave.")
    ] = False,
    into: Annotated[
        str | None, typer.Option(help="Put the table into this document, such as README.md, instead.")
    ] = None,
) -> None:
    """Print the supported models as a Markdown table."""
    from ..towers.supported import full_table, short_table, write_table

    table = full_table() if full else short_table()
    if into is None:
        typer.echo(table)
    else:
        write_table(into, table)
