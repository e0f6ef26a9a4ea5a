"""The command line ``register-adapter``: one file for the flags of each command; ``runs`` has what they do."""

from .cli import main

__all__ = ["main"]
