"""Blocks that gradient checkpointing computes again, in the thread of the backward pass: autograd's, on a GPU."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from crossings import crossings
from execution_cases import WAYS, gradients, registered, trained, whole
from families import make_inputs
from helpers import flatten
from torch import nn

from register_adapter import RegisterConfig, add_registers, capture, find_register_layer, find_tower

CHECKPOINTING = {"reentrant": {"use_reentrant": True}, "not-reentrant": {"use_reentrant": False}}
#: Ways that do something inside a block, and those of them that every library knows.
INSIDE = ("deep", "key_value", "gate", "neurons")
LATE = ("insert_layer", "deep", "neurons")
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
kinds = pytest.mark.parametrize("kind", CHECKPOINTING)


def elsewhere(call: Callable[[], Any]) -> None:
    """Run it in a thread of its own, as autograd does on a GPU."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(value.grad) for name, value in trained(model).items() if value.grad is not None}


def checkpointed(model: Any, kind: str) -> Any:
    model.get_base_model().gradient_checkpointing_enable(CHECKPOINTING[kind])
    return model


@kinds
@pytest.mark.parametrize(("name", "way"), crossings(["vit", "beit", "dinov3", "siglip2-vision"], WAYS, whole=["vit"]))
def test_a_backward_pass_in_another_thread(name: str, way: str, kind: str) -> None:
    model, inputs = registered(name, way).train(), make_inputs(name)
    model(**inputs).last_hidden_state.square().mean().backward()
    expected = grads(model)
    model.zero_grad()
    loss = checkpointed(model, kind)(**inputs).last_hidden_state.square().mean()
    elsewhere(loss.backward)
    assert expected
    torch.testing.assert_close(grads(model), expected)


@kinds
@pytest.mark.parametrize(("change", "way"), crossings(["disabled", "another", "deleted"], INSIDE, whole=["disabled"]))
def test_what_is_chosen_after_a_pass_is_not_for_its_backward(way: str, change: str, kind: str) -> None:
    inputs, expected = make_inputs("vit"), {}
    for checkpointing in (False, True):
        model = registered("vit", way).train()
        model.add_adapter("other", RegisterConfig(num_registers=3, init_std=1.0, deep=True))
        if checkpointing:
            checkpointed(model, kind)
        loss = model(**inputs).last_hidden_state.square().mean()
        if change == "another":
            model.set_adapter("other")
            find_register_layer(model).tokens("default").requires_grad_(True)
            elsewhere(loss.backward)
        elif change == "disabled":
            with model.disable_adapter():
                loss.backward()
        else:
            tokens = find_register_layer(model).tokens("default")
            model.delete_adapter("default")
            loss.backward()
            got = {name: whole(value.grad) for name, value in tokens.named_parameters() if value.grad is not None}
        got = got if change == "deleted" else grads(model)
        expected = expected or got
    assert expected
    torch.testing.assert_close(got, expected)


@kinds
@pytest.mark.parametrize("way", INSIDE)
def test_a_pass_without_registers_has_its_backward_without(way: str, kind: str) -> None:
    model, inputs = registered("vit", way).train(), make_inputs("vit")
    pixels = inputs["pixel_values"].requires_grad_()
    with model.disable_adapter():
        model(**inputs).last_hidden_state.square().mean().backward()
    expected, pixels.grad = pixels.grad.clone(), None
    with checkpointed(model, kind).disable_adapter():
        loss = model(**inputs).last_hidden_state.square().mean()
    elsewhere(loss.backward)
    torch.testing.assert_close(pixels.grad, expected)
    assert not grads(model)


@kinds
def test_a_module_that_is_called_alone_after_it(kind: str) -> None:
    model, inputs = registered("vit", "insert_layer").train(), make_inputs("vit")
    checkpointed(model, kind)(**inputs).last_hidden_state.sum().backward()
    norm = find_tower(model).part("remove")
    assert norm(torch.randn(2, 9, 32)).shape == (2, 9, 32)


@kinds
@pytest.mark.parametrize(("thread", "way"), crossings([False, True], WAYS))
def test_a_backward_pass_inside_capture(way: str, thread: bool, kind: str) -> None:
    results = []
    for checkpointing in (False, True):
        model, inputs = registered("vit", way).train(), make_inputs("vit")
        if checkpointing:
            checkpointed(model, kind)
        with capture(model) as trace:
            loss = model(**inputs).last_hidden_state.square().mean() + trace.registers.square().mean()
            loss = loss + trace.hidden_states[1].square().mean()
            elsewhere(loss.backward) if thread else loss.backward()
        seen = [value.detach() for value in (*trace.hidden_states, *trace.attentions, trace.registers)]
        results.append((seen, grads(model)))
    torch.testing.assert_close(results[1], results[0])


@kinds
def test_masked_images_with_register_neurons(kind: str) -> None:
    model, inputs = registered("siglip2-vision", "neurons").train(), make_inputs("siglip2-vision")
    inputs["pixel_attention_mask"][1, -6:] = 0
    model(**inputs).last_hidden_state.square().mean().backward()
    expected = grads(model)
    model.zero_grad()
    checkpointed(model, kind)(**inputs).last_hidden_state.square().mean().backward()
    torch.testing.assert_close(grads(model), expected)


@kinds
@pytest.mark.parametrize("registers", [False, True])
def test_a_backward_pass_behind_capture(registers: bool, kind: str) -> None:
    """Its attention was eager."""
    results = []
    for checkpointing in (False, True):
        model, inputs = registered("vit", "key_value").train(), make_inputs("vit")
        model = model if registers else model.unload().requires_grad_()
        if checkpointing:
            (model.get_base_model() if registers else model).gradient_checkpointing_enable(CHECKPOINTING[kind])
        with capture(model):
            loss = model(**inputs).last_hidden_state.square().mean()
        model(**inputs)
        elsewhere(loss.backward)
        results.append(grads(model))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(("name", "way"), crossings(["timm", "eva02", "dinov3-timm", "open_clip"], LATE))
@pytest.mark.parametrize("change", ["disabled", "other", "none"])
def test_libraries_that_checkpoint_whole_blocks(name: str, way: str, change: str) -> None:
    stacks = pytest.importorskip("stacks_cases")
    expected: dict[str, torch.Tensor] = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = add_registers(stacks.build_stack(name), 3, init_std=1.0, **WAYS[way]).train()
        model.add_adapter("other", RegisterConfig(num_registers=2, init_std=1.0, deep=True))
        stacks.tower_of(name, model.get_base_model()).set_grad_checkpointing(checkpointing)
        pixels = stacks.images().requires_grad_()
        with model.disable_adapter() if change == "disabled" else nullcontext():
            loss = sum(value.square().sum() for value in flatten(model(pixels)).values())
        if change == "other":
            model.set_adapter("other")
            find_register_layer(model).tokens("default").requires_grad_(True)
        elsewhere(loss.backward)
        got = {**grads(model), "pixels": pixels.grad}
        expected = expected or got
    assert len(expected) > (change != "disabled")
    torch.testing.assert_close(got, expected)


@kinds
def test_nothing_of_it_stays_behind(kind: str) -> None:
    model, inputs = registered("vit", "deep").train(), make_inputs("vit")
    base = checkpointed(model, kind).get_base_model()
    functions = {name: vars(part).get("_gradient_checkpointing_func") for name, part in base.named_modules()}
    with capture(model):
        model(**inputs).last_hidden_state.sum().backward()
    copied = copy.deepcopy(model)
    torch.testing.assert_close(gradients(copied, inputs), gradients(model, inputs))
    pickle.loads(pickle.dumps(model))
    for name, part in model.unload().named_modules():
        assert vars(part).get("_gradient_checkpointing_func") is functions[name]
