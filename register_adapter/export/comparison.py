"""The comparison of an exported model with the model it comes from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..towers.modes import evaluating
from ..tuner.hooks.tokens import cut_tokens
from .subject import OTHER_FORMS, Subject, call

__all__ = ["check_equal", "tensors"]

# Both models do the same arithmetic, so nothing but a kernel that is not deterministic may make a difference.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
_COARSE = 2e-2


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in a nested output, by its name joined with underscores; ``output`` for a single tensor."""
    if isinstance(value, torch.Tensor):
        return {name or "output": value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple | list) else ()
    named: dict[str, torch.Tensor] = {}
    for key, item in items:
        named |= tensors(item, f"{name}_{key}" if name else str(key))
    return named


def check_equal(subject: Subject, plain: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Check that an exported model computes what its source does; registers in between are cut out first.

    Args:
        subject: The source.
        plain: The exported model.
        inputs: Arguments for one forward pass, by name.

    Raises:
        ValueError: The source cannot be run on ``inputs``.
        UnsupportedModelError: The exported model gives other outputs, or none.
    """
    name = type(plain).__name__
    advice = (
        f"The model reads or returns the registers of its own tower elsewhere, so {name} is not equivalent. "
        f"{OTHER_FORMS} Or export the tower alone."
    )
    with evaluating(subject.base, plain):
        try:
            expected = tensors(call(subject.base, inputs))
        except Exception as error:
            raise ValueError(
                f"{type(subject.base).__name__} could not be run on the inputs {list(inputs)} ({error}), so the export "
                "cannot be checked: give example_inputs={...}, the tensors of one forward pass by name."
            ) from error
        try:
            actual = tensors(call(plain, inputs))
        except Exception as error:
            raise UnsupportedModelError(f"{name} cannot be run with native registers ({error}). {advice}") from error
    count = sum(segment.count for segment in subject.segments)
    for key, value in expected.items():
        other = actual.get(key)
        if other is not None and other.shape != value.shape and other.ndim == 3:
            other = cut_tokens(other, subject.layer.prefix, count, value.shape[1] + count)
        if other is None or other.shape != value.shape:
            shape = None if other is None else tuple(other.shape)
            raise UnsupportedModelError(
                f"with native registers the output {key!r} of {name} has shape {shape}, not {tuple(value.shape)}. "
                + advice
            )
        if value.is_floating_point() and value.numel():
            scale = value.float().abs().max().clamp_min(1.0)
            difference = ((other.float() - value.float()).abs().max() / scale).item()
            if not difference <= _TOLERANCE.get(value.dtype, _COARSE):
                raise UnsupportedModelError(
                    f"with native registers the output {key!r} of {name} differs by {difference:.1e}. {advice}"
                )
