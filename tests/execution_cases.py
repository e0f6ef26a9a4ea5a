"""Models with registers and the gradients they get: what the tests of execution modes share with their scripts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build
from torch import nn

from register_adapter import add_registers, find_tower
from register_adapter.tuner.hooks.attention import reads_implementation

#: Ways for registers to enter.
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "insert_layer": {"insert_layer": 1},
    "deep": {"deep": True},
    "key_value": {"key_value": True},
    "gate": {"gate": -1.0},
    "neurons": {"register_neurons": {0: [0, 3, 7], 1: [5]}, "train_removal": True},
}
#: What two processes train.
SHARDED = [(name, way) for name in ("vit", "dinov3") for way in WAYS]


def registered(name: str, way: str, base: Any = None) -> Any:
    """The model ``name`` with three large registers, the same values at every call, in evaluation mode.

    A test is skipped where the model refuses the way.
    """
    base = build(name) if base is None else base
    if way in ("key_value", "gate") and not reads_implementation(find_tower(base)):
        pytest.skip(f"{name} does not go through the attention interface in this version of transformers")
    torch.manual_seed(0)
    return add_registers(base, 3, init_std=1.0, **WAYS[way]).eval()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def short(name: str) -> str:
    """The name of a register parameter without the model around it, which wrappers rename."""
    return name.rpartition("register_adapter_tokens.")[2].replace("_fsdp_wrapped_module.", "")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {short(name): value for name, value in model.named_parameters() if value.requires_grad}


def trained_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters, whole."""
    return {name: whole(value) for name, value in trained(model).items()}


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their gradients after one backward pass of a mean over the batch, whole."""
    model.zero_grad()
    model(**inputs).last_hidden_state.square().mean().backward()
    return {name: whole(value.grad) for name, value in trained(model).items()}
