"""capture() shows what is inside, with and without registers, and leaves the model as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from crossings import crossings
from families import BLOCKS, CASES, FAMILIES, HEADS, TOWERS, WIDTH, build, make_inputs
from helpers import assert_identical, hooks, run
from torch import nn

from register_adapter import (
    RegisterConfig,
    UnsupportedModelError,
    add_registers,
    capture,
    find_register_layer,
    find_tower,
)


@pytest.mark.parametrize(("name", "num_registers", "attention"), crossings(CASES, (1, 4), ("eager", "sdpa")))
def test_registers_hidden_states_and_attentions_have_their_full_shapes(
    name: str, num_registers: int, attention: str
) -> None:
    model, inputs = add_registers(build(name, attention), num_registers).eval(), make_inputs(name)
    tower = find_register_layer(model).tower
    case = CASES[name]
    images, patches = 2 * case.images, case.patches
    blocks, length = len(tower.part("blocks")), tower.prefix + num_registers + patches
    with torch.no_grad(), capture(model) as trace:
        model(**inputs)
    assert trace.registers.shape == (images, num_registers, WIDTH)
    assert trace.patches().shape == (images, patches, WIDTH)
    assert [tuple(state.shape) for state in trace.hidden_states] == [(images, length, WIDTH)] * (blocks + 1)
    assert [tuple(maps.shape) for maps in trace.attentions] == [(images, HEADS, length, length)] * blocks
    for maps in trace.attentions:
        torch.testing.assert_close(maps.sum(-1), torch.ones(images, HEADS, length))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_base_without_registers_can_be_captured(name: str) -> None:
    base, inputs = build(name), make_inputs(name)
    with torch.no_grad(), capture(base) as trace:
        base(**inputs)
    assert trace.num_registers == 0
    images = 2 * CASES[name].images
    assert trace.registers.shape == (images, 0, WIDTH)
    assert trace.hidden_states[0].shape == (images, trace.prefix + CASES[name].patches, WIDTH)


@pytest.mark.parametrize("name", [name for name in TOWERS if name.startswith(("dinov2", "vit", "deit"))])
def test_states_stand_before_the_final_norm_and_registers_behind_it(name: str) -> None:
    model, inputs = add_registers(build(name, "eager"), 4).eval(), make_inputs(name)
    with torch.no_grad(), capture(model) as trace:
        last = model(**inputs).last_hidden_state
    norm = find_register_layer(model).tower.part("final_norm").forward
    before = trace.hidden_states[-1]
    cut = torch.cat([before[:, : trace.prefix], trace.patches()], dim=1)
    torch.testing.assert_close(norm(cut), last)
    torch.testing.assert_close(trace.registers, norm(before[:, trace.prefix : trace.prefix + 4]))


@pytest.mark.parametrize("name", TOWERS)
def test_the_first_state_holds_the_registers_themselves(name: str) -> None:
    model, inputs = add_registers(build(name), 4).eval(), make_inputs(name)
    with torch.no_grad(), capture(model) as trace:
        model(**inputs)
    registers = trace.hidden_states[0][:, trace.prefix : trace.prefix + 4]
    weight = find_register_layer(model).tokens("default").weight
    norm = getattr(find_register_layer(model).tower.module, "pre_layrnorm", nn.Identity())  # CLIP's, before block 0
    torch.testing.assert_close(registers, norm(weight).expand_as(registers))


@pytest.mark.parametrize("name", FAMILIES)
def test_it_restores_sdpa_and_every_hook_and_output(name: str) -> None:
    model, inputs = add_registers(build(name, "sdpa"), 4).eval(), make_inputs(name)
    expected, installed = run(model, inputs), hooks(model)
    tower = find_register_layer(model).tower
    before = tower.config._attn_implementation  # eager, for a few families without SDPA
    with torch.no_grad(), capture(model):
        assert tower.config._attn_implementation in ("eager", None)  # None: it has no other, in transformers 4
        model(**inputs)
        assert hooks(model) != installed
    assert tower.config._attn_implementation == before
    assert hooks(model) == installed
    assert_identical(run(model, inputs), expected)


@pytest.mark.parametrize("name", ["vit", "clip", "llava", "dinov2-backbone"])
def test_an_exception_inside_leaves_no_hook_and_restores_sdpa(name: str) -> None:
    model, inputs = add_registers(build(name, "sdpa"), 4).eval(), make_inputs(name)
    expected, installed = run(model, inputs), hooks(model)

    def fail() -> None:
        with capture(model):
            model(**inputs)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    with pytest.raises(Exception), capture(model):  # noqa: B017, PT011 - whatever the model raises
        model(pixel_values=torch.zeros(2, 3, 7))
    assert hooks(model) == installed
    assert find_register_layer(model).tower.config._attn_implementation == "sdpa"
    assert_identical(run(model, inputs), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["vit", "clip"])
def test_a_copy_made_meanwhile_does_not_write_into_the_trace(name: str, duplicate: Any) -> None:
    model, inputs = add_registers(build(name, "sdpa"), 4).eval(), make_inputs(name)
    with torch.no_grad(), capture(model, attentions=False) as trace:
        model(**inputs)
        twin, seen = duplicate(model), trace.patches(1).clone()
        twin(**{key: value + 1 if value.is_floating_point() else value for key, value in inputs.items()})
        assert torch.equal(trace.patches(1), seen)
    assert_identical(run(twin, inputs), run(model, inputs))


def test_sdpa_and_eager_show_the_same() -> None:
    traces = []
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = add_registers(build("vit", attention), 4).eval()
        with torch.no_grad(), capture(model) as trace:
            model(**make_inputs("vit"))
        traces.append(trace)
    assert torch.equal(traces[0].attentions[-1], traces[1].attentions[-1])
    assert torch.equal(traces[0].registers, traces[1].registers)


def test_disabled_and_switched_adapters_are_seen() -> None:
    model, inputs = add_registers(build("vit"), 4).eval(), make_inputs("vit")
    model.add_adapter("other", RegisterConfig(num_registers=2))
    with torch.no_grad(), capture(model) as trace:
        model(**inputs)
        assert trace.registers.shape[1] == 4
        with model.disable_adapter():
            model(**inputs)
        assert trace.num_registers == 0
        model.set_adapter("other")
        model(**inputs)
        assert trace.registers.shape[1] == 2


def test_gradients_flow_through_what_was_captured() -> None:
    model = add_registers(build("vit"), 4)
    with capture(model) as trace:
        model(**make_inputs("vit"))
    trace.registers.square().sum().backward()
    assert find_register_layer(model).tokens("default").weight.grad.abs().sum() > 0


def test_parts_can_be_left_out() -> None:
    model, inputs = add_registers(build("vit", "sdpa"), 4).eval(), make_inputs("vit")
    with torch.no_grad(), capture(model, attentions=False) as trace:
        assert find_register_layer(model).tower.config._attn_implementation == "sdpa"
        model(**inputs)
    assert trace.attentions == ()
    assert len(trace.hidden_states) == BLOCKS + 1
    with torch.no_grad(), capture(model, hidden_states=False) as trace:
        model(**inputs)
    assert trace.hidden_states == ()
    assert len(trace.attentions) == BLOCKS


def test_asking_before_a_forward_pass_says_what_to_do() -> None:
    with capture(add_registers(build("vit"), 4)) as trace, pytest.raises(RuntimeError, match="call the model inside"):
        _ = trace.registers


def test_a_model_without_a_tower_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear has no vision tower"), capture(nn.Linear(2, 2)):
        pass


def test_the_captured_tower_is_the_one_with_the_registers() -> None:
    model = add_registers(build("clip"), 4)
    assert find_register_layer(model).tower.module is find_tower(model).module
