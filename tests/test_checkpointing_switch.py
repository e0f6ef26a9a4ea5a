"""A run that checkpoints blocks leaves the user's own setting of it as it was."""

from __future__ import annotations

from typing import Any

import pytest
from families import build
from stacks_cases import build_stack

from register_adapter import add_registers
from register_adapter.training.block_modes import checkpointed_blocks

NAMES = ("gradient_checkpointing", "_gradient_checkpointing_func", "grad_checkpointing")


def _state(model: Any) -> list[Any]:
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [*hooks, *(getattr(module, name, None) for module in model.modules() for name in NAMES)]


def _switch_on(base: Any) -> None:
    if hasattr(base, "set_grad_checkpointing"):
        base.set_grad_checkpointing(True)
    else:
        base.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("on", ["all", "every other", "none"])
@pytest.mark.parametrize("name", ["vit", "llava", "timm", "open_clip-whole", "open_clip-timm", "timm-wrapper"])
def test_what_was_on_is_on_afterwards(name: str, on: str) -> None:
    base = build(name) if name in ("vit", "llava") else build_stack(name)
    model = add_registers(base, 2)
    if on != "none":
        _switch_on(base)
    if on == "every other":
        flagged = [module for module in base.modules() if getattr(module, "gradient_checkpointing", False)]
        for module in flagged[::2]:
            module.gradient_checkpointing = False
    before = _state(base)
    with checkpointed_blocks(model):
        assert any(getattr(module, name, False) is True for module in base.modules() for name in NAMES)
    assert _state(base) == before
