"""What is no model, such as a model's name, is refused as such by whatever takes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import ViTModel

from register_adapter import (
    RegisterConfig,
    add_registers,
    attention_map,
    audit,
    capture,
    compose,
    export_native,
    find_tower,
    fit_test_time_registers,
    get_features,
)


def _capture(model: Any) -> None:
    with capture(model):
        pass


CALLS: dict[str, Callable[[Any], Any]] = {
    "add_registers": add_registers,
    "compose": lambda model: compose(model, {"registers": RegisterConfig()}),
    "audit": lambda model: audit(model, "images"),
    "fit": lambda model: fit_test_time_registers(model, "images"),
    "capture": _capture,
    "attention_map": lambda model: attention_map(model, torch.zeros(1, 3, 32, 32)),
    "export_native": export_native,
    "find_tower": find_tower,
    "get_features": lambda model: get_features(model, "images"),
}


@pytest.mark.parametrize("model", ["facebook/dinov2-base", None, ViTModel], ids=["name", "none", "class"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_it_is_refused(call: Callable[[Any], Any], model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got .*AutoModel"):
        call(model)
