"""Flags of objectives: those of the chosen one, and of the terms that are added to it."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..flags.config_file import config_value
from . import OBJECTIVES
from .base import Objective
from .classification import ClassificationObjective
from .terms import Term, WeightedTerms

__all__ = [
    "add_objective_flags",
    "added_terms",
    "early_value",
    "make_objective",
    "needed_keys",
    "objective_of",
    "takers_of",
]


def early_value(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag that is needed before the parser is made."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{flag}")
    value: str | None = getattr(parser.parse_known_args(argv)[0], flag)
    return value


def objective_of(argv: Sequence[str]) -> str:
    """Name of the objective, which decides what other flags there are; a wrong one is refused later, with the rest."""
    path = early_value(argv, "config")
    name = early_value(argv, "objective")
    if name is None and path is not None:
        with suppress(ValueError, OSError):  # the parser says what is wrong
            name = config_value(path, "objective")
    return name if name in OBJECTIVES else ClassificationObjective.name


def added_terms(argv: Sequence[str], objective: str) -> list[str]:
    """Names of the terms that the command line, or its file, adds to the objective."""
    path = early_value(argv, "config")
    words = {word.partition("=")[0].removeprefix("--").replace("_", "-") for word in argv if word.startswith("--")}

    def is_added(name: str) -> bool:
        if _hyphened(name) in words or path is None:
            return _hyphened(name) in words
        with suppress(ValueError, OSError):
            return config_value(path, name.replace("-", "_")) is not None
        return False

    return [name for name in _addable_terms(objective) if is_added(name)]


def add_objective_flags(parser: ArgumentParser, objective: str, added: Sequence[str] = ()) -> None:
    """Add the flags of an objective and of the terms that are added to it, and a weight for each term that can be."""
    for name in (objective, *added):
        group: Any = _Once(parser, parser.add_argument_group(f"objective {name}"))
        OBJECTIVES[name].add_arguments(group)
    for name in _addable_terms(objective):
        flags = dict.fromkeys((f"--{_hyphened(name)}", f"--{name}"))
        parser.add_argument(*flags, type=_weight, metavar="WEIGHT", help=f"Add the term {name} with this weight.")


def takers_of(flag: str) -> list[str]:
    """Names of the objectives that take a flag, which others do not have."""
    wanted, takers = f"--{_hyphened(flag.lstrip('-'))}", []
    for name in OBJECTIVES:
        parser = ArgumentParser(add_help=False)
        OBJECTIVES[name].add_arguments(parser)
        known = {_hyphened(option) for option in parser._option_string_actions}
        weights = {f"--{_hyphened(term)}" for term in _addable_terms(name)}
        takers += [name] if wanted in known | weights else []
    return takers


def make_objective(name: str, flags: Namespace, labels: Sequence[str]) -> Objective:
    """The objective of the parsed flags, with the terms that are added to it."""
    objective = OBJECTIVES[name].from_arguments(flags, labels)
    if not isinstance(objective, Term):
        return objective
    terms = [(objective, 1.0)]
    for other in _addable_terms(name):
        weight = getattr(flags, other.replace("-", "_"))
        if weight is not None:
            added = OBJECTIVES[other].from_arguments(flags, labels)
            assert isinstance(added, Term)
            terms.append((added, weight))
    return WeightedTerms(terms)


def needed_keys(name: str, flags: Namespace) -> set[str]:
    """Keys that items must have for an objective and the terms that are added to it."""
    added = [other for other in _addable_terms(name) if getattr(flags, other.replace("-", "_")) is not None]
    return {key for kind in (name, *added) for key in OBJECTIVES[kind].needs}


def _addable_terms(objective: str) -> list[str]:
    """Names of the terms that can be added to an objective which is itself one."""
    terms = [name for name, kind in OBJECTIVES.items() if issubclass(kind, Term)]
    return [name for name in terms if name != objective] if objective in terms else []


def _hyphened(name: str) -> str:
    return name.replace("_", "-")


class _Once:
    """Adds to a group of flags those that the parser does not have yet: terms share some."""

    def __init__(self, parser: ArgumentParser, group: Any) -> None:
        self.parser, self.group = parser, group

    def add_argument(self, *names: str, **options: Any) -> None:
        """As of a parser."""
        if not any(name in self.parser._option_string_actions for name in names):
            self.group.add_argument(*names, **options)


def _weight(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"must be a finite number of at least 0, got {text!r}")
    return value
