"""What stands in for a method of one module: an attribute of the module that shows the method's own signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

__all__ = ["StandIn"]


class StandIn(partial[Any]):
    """A function with arguments filled in, which looks like the method that it stands in for.

    Libraries read which arguments a method takes: transformers' ``generate`` hands ``get_image_features`` those that
    its signature names, and none to a bare ``partial``. Which method it is belongs to the attributes, not to a
    closure, so that a copy of the module has one of its own.
    """

    owner: Any
    method: str

    @classmethod
    def of(cls, owner: Any, method: str, function: Callable[..., Any], *args: Any) -> StandIn:
        """Stand in for ``owner.method``.

        Args:
            owner: The module.
            method: Name of its class's method.
            function: What is called instead.
            *args: Its first arguments.
        """
        made = cls(function, *args)
        made.owner, made.method = owner, method
        return made

    @property
    def __name__(self) -> str:
        return self.method

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the bound method."""
        return inspect.signature(MethodType(getattr(type(self.owner), self.method), self.owner))
