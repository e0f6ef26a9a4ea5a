"""Contexts of several threads on one model overlap: each sees its own, and nothing stays changed when all are done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import run
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.testing import assert_close

from register_adapter import RegisterConfig, add_registers, capture, compose, find_register_layer, find_tower
from register_adapter.artifacts.statistics import collect_statistics
from register_adapter.features.grid import watch_patches
from register_adapter.features.passes import keep_layer

Context = Callable[[], AbstractContextManager[Any]]


def overlap(first: Context, second: Context, inside: Callable[[], Any]) -> list[Any]:
    """Enter the first, then the second, leave the first, then the second, and say what each thread saw last inside."""
    entered, left = threading.Event(), threading.Event()
    both = threading.Event()
    seen: list[Any] = [None, None]

    def early() -> None:
        with first():
            entered.set()
            both.wait()
            seen[0] = inside()
        left.set()

    def late() -> None:
        entered.wait()
        with second():
            both.set()
            left.wait()
            seen[1] = inside()

    threads = [threading.Thread(target=early), threading.Thread(target=late)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["query", "q_proj"], init_lora_weights=False)


def states(model: Any) -> list[Any]:
    parts = [part for part in model.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    return [(list(part.active_adapters), part.disable_adapters) for part in parts]


@pytest.mark.parametrize(
    ("first", "second"), [("lora", "more"), ("lora", "lora"), (None, "lora"), ("registers", None), (None, None)]
)
def test_adapters_of_several_methods(first: str | None, second: str | None) -> None:
    configs = {"registers": RegisterConfig(num_registers=2, init_std=1.0), "lora": lora(), "more": lora()}
    model = compose(build("vit"), configs).eval()

    @torch.no_grad()
    def call() -> Any:
        return run(model, make_inputs("vit"))

    before, flags, expected = states(model), [p.requires_grad for p in model.parameters()], call()
    with model.disable_adapter(second):
        wanted = call()
    seen = overlap(lambda: model.disable_adapter(first), lambda: model.disable_adapter(second), call)
    assert_close(seen[1], wanted)
    assert states(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert_close(call(), expected)


def test_a_choice_that_is_made_inside_stays_where_nothing_was_set_aside() -> None:
    model = compose(build("vit"), {"registers": RegisterConfig(num_registers=2), "lora": lora(), "more": lora()})
    with model.disable_adapter("registers"):
        model.set_adapter("more")
    assert model.active_adapters == ["registers", "more"]


def test_heads_beside_registers() -> None:
    model = add_registers(build("vit-classifier"), 2, init_std=1.0, modules_to_save=["classifier"]).eval()

    @torch.no_grad()
    def call() -> Any:
        return run(model, make_inputs("vit-classifier"))

    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    before, flags, expected = states(model), [p.requires_grad for p in model.parameters()], call()
    with model.disable_adapter():
        wanted = call()
        assert not model.has_active_enabled_adapter
    assert not torch.allclose(wanted["logits"], expected["logits"])
    for values in overlap(model.disable_adapter, model.disable_adapter, call):
        assert_close(values, wanted)
    assert states(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert_close(call(), expected)


def test_registers_that_are_set_aside_for_all() -> None:
    model = add_registers(build("vit"), 2).eval()
    layer = find_register_layer(model)
    assert layer is not None
    assert overlap(layer.set_aside, layer.set_aside, lambda: layer.num_active) == [0, 0]
    assert layer.num_active == 2


def test_what_one_thread_records_is_of_its_own_passes() -> None:
    model = add_registers(build("vit"), 2).eval()
    tower = find_tower(model)
    first_batch, other = make_inputs("vit", batch=3), make_inputs("vit", batch=1)

    def beside() -> None:
        thread = threading.Thread(target=lambda: run(model, other))
        thread.start()
        thread.join()

    with (
        torch.no_grad(),
        watch_patches(tower) as grid,
        keep_layer(tower, 0) as first,
        keep_layer(tower, 2) as last,
        collect_statistics(tower, attentions=False) as statistics,
    ):
        run(model, first_batch)
        beside()
    assert len(first[0]) == len(last[0]) == len(grid.pixels()) == 3
    assert statistics.num_images == 3


@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip2-vision"])
@pytest.mark.parametrize("first", [0, 1])
def test_captures_of_one_thread_end_in_any_order(name: str, first: int) -> None:
    """As generators that hold one do: the second had no attention maps once the first had ended."""
    model, inputs = add_registers(build(name), 2, init_std=1.0).eval(), make_inputs(name)
    with capture(model) as trace:
        run(model, inputs)
    expected = trace.attentions
    assert expected
    contexts = [capture(model), capture(model)]
    traces = [context.__enter__() for context in contexts]
    contexts.pop(first).__exit__(None, None, None)
    traces.pop(first)
    run(model, inputs)
    assert_close(traces[0].attentions, expected)
    contexts[0].__exit__(None, None, None)
    assert find_tower(model).config._attn_implementation == "sdpa"


def test_hooks_that_another_thread_puts_on_meanwhile() -> None:
    """What a thread does between two steps of the walk over all hooks, a hook does here when it is looked at."""
    model = add_registers(build("vit"), 2).eval()
    tower = find_tower(model).module

    class Busy:
        def __call__(self, *_: Any) -> None:
            return None

        def __getattr__(self, name: str) -> Any:
            tower.register_forward_pre_hook(lambda *_: None)
            raise AttributeError(name)

    tower.register_forward_pre_hook(Busy())
    tower.register_forward_pre_hook(lambda *_: None)
    with model.disable_adapter():
        assert find_register_layer(model).num_active == 0
    assert find_register_layer(model).num_active == 2
