"""Extension of griffe for `make docs`: docstrings in Sphinx's roles, shown by a site that is made from Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([^`]+)`")
_LITERAL = re.compile(r"``([^`]+)``")
_EXAMPLE = re.compile(r"(?m)^( *)Example:$")


class Docstrings(griffe.Extension):
    """Roles become code, and ``Example:`` the section that griffe knows, whose code is shown as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object before it is parsed."""
        if obj.docstring:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", _LITERAL.sub(r"`\1`", text))
