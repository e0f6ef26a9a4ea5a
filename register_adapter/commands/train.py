"""The command ``register-adapter train``: ``python -m register_adapter.train``, whose parser has all of its flags."""

from __future__ import annotations

import typer

__all__ = ["register", "train_command"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    # Every flag goes through untouched, --help included.
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command("train", context_settings=settings)(train_command)


def train_command(context: typer.Context) -> None:
    """Train registers on a frozen model, with or without labels, in this process; --help lists the flags."""
    from .. import testbed  # noqa: F401 - says how shipped models are made
    from ..training.launch import main

    main(context.args, prog="register-adapter train")
