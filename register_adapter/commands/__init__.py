"""The command line ``register-adapter``, one file a command."""

from .cli import main

__all__ = ["main"]
