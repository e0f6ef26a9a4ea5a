"""Eager attention, which attention maps need, is for the passes of one thread: masks of another stay right."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import run

from register_adapter import add_registers, capture, find_register_layer, find_tower
from register_adapter.features.eager import eager_in_this_thread


def _model(attached: bool, name: str = "siglip2-vision") -> Any:
    base = build(name, "sdpa")
    return add_registers(base, 2, init_std=1.0).eval() if attached else base.eval()


def _beside(module: Any, call: Callable[[], Any], enter: Callable[[], Any]) -> Any:
    """What ``call`` returns in a thread that stops before ``module`` until this one has entered the context."""
    there, on, results = threading.Event(), threading.Event(), list[Any]()

    def stop(*_: Any) -> None:
        there.set()
        on.wait(20)

    thread = threading.Thread(target=lambda: results.append(call()))
    hook = module.register_forward_pre_hook(stop)
    thread.start()
    there.wait(20)
    with enter():
        on.set()
        thread.join()
    hook.remove()
    return results[0]


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("attached", [True, False], ids=["registers", "base"])
def test_a_masked_pass_of_another_thread(attached: bool, block: int) -> None:
    model, inputs = _model(attached), dict(make_inputs("siglip2-vision"))
    mask = inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].clone()
    mask[0, 9:] = 0
    tower = find_register_layer(model).tower if attached else find_tower(model)
    expected = run(model, inputs)
    actual = _beside(tower.part("blocks")[block], lambda: run(model, inputs), lambda: capture(model))
    assert torch.equal(actual["last_hidden_state"], expected["last_hidden_state"])


@pytest.mark.parametrize("options", [{}, {"gate": -1.0}, {"key_value": True}], ids=["tokens", "gate", "pairs"])
def test_a_thread_asks_for_its_own(options: dict[str, Any]) -> None:
    tower = find_register_layer(add_registers(build("vit", "sdpa"), 2, **options)).tower
    seen: list[str] = []

    def look() -> None:
        seen.append(tower.config._attn_implementation)

    kind = type(tower.config)
    with eager_in_this_thread(tower), eager_in_this_thread(tower):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        look()
        tower.config._attn_implementation = "flex_attention"  # chosen meanwhile, for what comes after
        look()
    look()
    assert seen == ["sdpa", "eager", "eager", "flex_attention"]
    assert type(tower.config) is kind


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("again", [copy.deepcopy, _pickled])
def test_a_copy_made_inside_has_no_part_in_it(again: Callable[[Any], Any]) -> None:
    tower = find_tower(build("vit", "sdpa"))
    kind = type(tower.config)
    with eager_in_this_thread(tower):
        copied = again(tower.config)
        assert copied._attn_implementation == "sdpa"
        assert tower.config.to_dict() == copied.to_dict()
    assert type(copied) is kind
    assert copied == tower.config
