"""Registers that go between a forward and its backward pass: the gradients are those of the pass, or it is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import flatten, hooks
from stacks_cases import STACKS, build_stack, images

from register_adapter import RegisterAdapterError, add_registers

MODES: list[dict[str, Any]] = [{}, {"insert_layer": 1}, {"deep": True}, {"register_neurons": {1: [3, 5]}}]
WAYS = [("vit", mode) for mode in (*MODES, {"key_value": True}, {"gate": -1.0})]
WAYS += [(family, mode) for family in ("timm", "eva", "open_clip", "torchvision") for mode in MODES]
OFF: dict[str, Callable[[Any], Any]] = {
    "unload": lambda model: model.unload(),
    "delete": lambda model: model.delete_adapter("default"),
}


def _model(family: str, options: dict[str, Any], checkpointed: bool) -> Any:
    torch.manual_seed(0)
    base = build_stack(family) if family in STACKS else build(family)
    model = add_registers(base, 2, init_std=1.0, **options).train()
    if checkpointed and hasattr(base, "set_grad_checkpointing"):
        base.set_grad_checkpointing(True)
    elif checkpointed and hasattr(base, "gradient_checkpointing_enable"):
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _loss(model: Any, family: str) -> torch.Tensor:
    output = flatten(model(images()) if family in STACKS else model(**make_inputs(family)))
    return sum((value.square().sum() for value in output.values()), torch.zeros(()))


def _registers(model: Any) -> list[torch.nn.Parameter]:
    return [value for name, value in model.named_parameters() if "register_adapter_tokens" in name]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("family", "options"), WAYS, ids=str)
@pytest.mark.parametrize("way", OFF)
def test_gradients_are_right_or_refused(way: str, family: str, options: dict[str, Any], checkpointed: bool) -> None:
    torch.manual_seed(1)
    reference = _model(family, options, checkpointed)
    _loss(reference, family).backward()
    model = _model(family, options, checkpointed)
    registers = _registers(model)
    base = model.get_base_model()
    loss = _loss(model, family)
    OFF[way](model)
    try:
        loss.backward()
    except RegisterAdapterError as refused:
        assert checkpointed
        assert options or family == "eva"
        assert "Call backward() first" in str(refused)  # noqa: PT017
    else:
        for parameter, other in zip(registers, _registers(reference), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad)
    del loss
    model = None
    base(images()) if family in STACKS else base(**make_inputs(family))
    if way == "unload":
        assert not hooks(base), "nothing is left when the pass is over"


@pytest.mark.parametrize("way", OFF)
def test_copies_of_a_base_whose_registers_went_before_the_backward_pass(way: str) -> None:
    """What waits for the backward pass leaves a copy at its first pass, and the base at the first one after it."""
    model = _model("timm", {"insert_layer": 1}, checkpointed=True)
    base = model.get_base_model()
    loss = _loss(model, "timm")
    OFF[way](model)
    waiting = hooks(base)
    expected = flatten(base(images()))
    copies = [copy.deepcopy(base), pickle.loads(pickle.dumps(base))]
    for copied in copies:
        torch.testing.assert_close(flatten(copied(images())), expected)
        assert len(hooks(copied)) < len(waiting)
        torch.testing.assert_close(flatten(copied(images())), expected)
    assert hooks(base) == waiting
    del loss
    base(images())
    assert hooks(base) == hooks(copies[0])
