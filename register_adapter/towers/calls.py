"""How a tower and its blocks are called: the sequence among their arguments, and inputs by their names."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

__all__ = [
    "as_named",
    "first_of",
    "hidden_states_of",
    "place_of_argument",
    "unwrapped",
    "with_first",
    "with_hidden_states",
]

# What modules call the sequence that comes in, where it is not a positional argument.
_NAMES = ("hidden_states", "inputs_embeds", "x")


def hidden_states_of(args: Any, kwargs: Any) -> torch.Tensor:
    """The sequence among a module's arguments: the first positional one, or the keyword of a usual name."""
    value: torch.Tensor = args[0] if args else next(kwargs[name] for name in _NAMES if name in kwargs)
    return value


def with_hidden_states(args: Any, kwargs: Any, hidden_states: torch.Tensor) -> tuple[Any, Any]:
    """The arguments with another sequence."""
    if args:
        return (hidden_states, *args[1:]), kwargs
    return args, {**kwargs, next(name for name in _NAMES if name in kwargs): hidden_states}


def as_named(inputs: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    """What an image processor returns, by the ``names`` of a forward's arguments.

    Before transformers 5 SigLIP 2's tower had another name for the mask of its processor.
    """
    mask, older = "pixel_attention_mask", "attention_mask"
    renamed = {mask: older} if mask not in names and older in names and older not in inputs else {}
    return {renamed.get(name, name): value for name, value in inputs.items()}


def first_of(output: Any) -> Any:
    """What a module returns, or the first item of a tuple: blocks return the sequence alone or with attention maps."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, first: Any) -> Any:
    """``output`` with ``first`` in the place of :func:`first_of`."""
    return (first, *output[1:]) if isinstance(output, tuple) else first


def unwrapped(module: Any) -> Any:
    """What is inside of wrappers that take anything and hand it on, as ``CheckpointWrapper`` and FSDP do."""
    while isinstance(module, nn.Module) and len(module._modules) == 1:
        kind: Any = type(module)
        if not _takes_anything(kind):
            break
        inner = next(iter(module._modules.values()))
        if inner is None:
            break
        module = inner
    return module


@cache
def _takes_anything(kind: Any) -> bool:
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return bool(parameters) and all(parameter.kind in _ANY for parameter in parameters)


_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def place_of_argument(module: nn.Module, name: str) -> int | None:
    """Place of an argument among the positional ones of a module, or of what it wraps; ``None`` if there is none."""
    inner = unwrapped(module)
    inner = unwrapped(getattr(inner, "original_module", inner))  # of a block that PEFT has a copy of (modules_to_save)
    names = list(inspect.signature(type(inner).forward).parameters)[1:]
    return names.index(name) if name in names else None
