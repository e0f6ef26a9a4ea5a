"""Arguments of public functions, checked before anything is done with them; and what dataclasses hold from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["check_fields", "check_mapping", "check_number", "check_whole"]


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


def check_fields(name: str, value: Any) -> None:
    """A dataclass whose fields hold what their type hints say, those of the dataclasses in them too.

    Args:
        name: What it is called in an error.
        value: The dataclass, made of a file.

    Raises:
        TypeError: A field holds something else; the message has the way to it, such as ``layers[3].outlier_share``.
    """
    hints = get_type_hints(type(value))
    for field in fields(value):
        _check_hint(f"{name}.{field.name}", getattr(value, field.name), hints[field.name])


def _check_hint(name: str, value: Any, hint: Any) -> None:
    origin, inside = get_origin(hint) or hint, get_args(hint)
    if origin is Any:
        return
    if origin in (Union, UnionType):
        # The unions of these dataclasses are of one type and None.
        if value is not None:
            _check_hint(name, value, next(part for part in inside if part is not type(None)))
    elif origin is Literal:
        if value not in inside:
            raise TypeError(f"{name} is none of {', '.join(map(repr, inside))}: {_found(value)}")
    elif origin is float:
        check_number(name, value)
        if value != value:
            raise TypeError(f"{name} is not a number: {value}")
    elif not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
        raise TypeError(f"{name} must be of type {origin.__name__}, got {_found(value)}")
    elif is_dataclass(origin):
        check_fields(name, value)
    elif origin is dict:
        for key, item in value.items():
            _check_hint(f"{name}[{key!r:.40}]", item, inside[1])
    elif origin in (list, tuple):
        if origin is tuple and len(value) != len(inside):
            raise TypeError(f"{name} must have {len(inside)} items, got {_found(value)}")
        for number, item in enumerate(value):
            _check_hint(f"{name}[{number}]", item, inside[number if origin is tuple else 0])


def _found(value: Any) -> str:
    return f"{value!r:.100} of type {type(value).__name__}"
