"""Arguments of public functions, checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

__all__ = ["check_mapping", "check_number", "check_whole"]


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """A whole number, of Python or numpy.

    Args:
        name: What it is called in an error.
        value: What was given.
        least: The smallest that it may be.

    Raises:
        TypeError: It is something else.
        ValueError: It is smaller.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {_found(value)}")
    if least is not None and int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: Any) -> None:
    """A number, whole or not.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {_found(value)}")


def check_mapping(name: str, value: Any, holds: str) -> None:
    """A dictionary.

    Args:
        name: What it is called in an error.
        value: What was given.
        holds: What it is to hold, in words.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dictionary {holds}, got {_found(value)}")


def _found(value: Any) -> str:
    return f"{value!r:.100} of type {type(value).__name__}"
