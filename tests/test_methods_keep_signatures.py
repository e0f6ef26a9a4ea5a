"""Methods that registers stand in for show their own signatures, from which libraries read what to hand on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, make_inputs
from stacks_cases import build_stack

from register_adapter import add_registers
from register_adapter.tuner.hooks.stand_in import StandIn


def stand_ins(model: Any) -> list[tuple[Any, str, Any]]:
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, StandIn)
    ]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: build("clip"), id="transformers"),
        pytest.param(lambda: build_stack("timm"), id="timm"),
        pytest.param(lambda: build_stack("open_clip-whole"), id="open_clip"),
        pytest.param(lambda: build_stack("hub"), id="hub"),
    ],
)
def test_signatures(make: Callable[[], Any]) -> None:
    model = add_registers(make())
    for wrapped in (model, copy.deepcopy(model)):
        methods = stand_ins(wrapped)
        assert methods
        for module, name, value in methods:
            assert value.owner is module
            assert (
                list(inspect.signature(value).parameters)
                == list(inspect.signature(getattr(type(module), name)).parameters)[1:]
            )


def test_generate() -> None:
    """transformers encodes images before it generates, with the arguments that ``get_image_features`` names."""
    base, inputs = build("llava"), make_inputs("llava")
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    before = base.generate(**inputs, **options)
    model = add_registers(base, init_std=1.0).eval()
    by_hand = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            whole = {**inputs, "input_ids": by_hand, "attention_mask": torch.ones_like(by_hand)}
            by_hand = torch.cat([by_hand, model(**whole).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(**inputs, **options), by_hand)
    with model.disable_adapter():
        assert torch.equal(model.generate(**inputs, **options), before)
