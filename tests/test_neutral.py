"""Registers that nobody sees change nothing: where they enter and leave, no other token moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import CASES, build, make_inputs
from helpers import run
from torch.nn import functional as F

from register_adapter import add_registers, find_register_layer, find_tower

REGISTERS = 9  # a length that no text or decoder here has


@contextmanager
def unseen(start: int, length: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Hide the keys of the registers from every attention over ``length`` tokens; yields a list as long as these."""
    hidden = torch.zeros(length, dtype=torch.bool)
    hidden[start : start + REGISTERS] = True
    calls: list[int] = []

    def softmax(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def masked(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if scores.ndim >= 3 and scores.shape[-2:] == (length, length):
                calls.append(1)
                scores = scores.masked_fill(hidden, -1e30)
            return original(scores, *args, **kwargs)

        return masked

    with monkeypatch.context() as patch:
        for owner in (F, torch, torch.Tensor):
            patch.setattr(owner, "softmax", softmax(owner.softmax))
        yield calls


@pytest.mark.parametrize("name", CASES)
def test_registers_that_nobody_sees_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, inputs = build(name, "eager"), make_inputs(name)
    expected = run(base, inputs, output_hidden_states=True)
    blocks = len(find_tower(base).part("blocks"))
    model = add_registers(base, REGISTERS, init_std=1.0).eval()
    prefix = find_register_layer(model).prefix
    with unseen(prefix, prefix + REGISTERS + CASES[name].patches, monkeypatch) as calls:
        outputs = run(model, inputs, output_hidden_states=True)
    assert len(calls) >= blocks
    for key, value in expected.items():
        torch.testing.assert_close(outputs[key], value, rtol=1e-3, atol=1e-3)
