"""A hook of the user's runs the model inside of one of its own passes: both passes know themselves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import run
from stacks_cases import build_stack, images
from torch.testing import assert_close

from register_adapter import add_registers, capture, find_register_layer, find_tower
from register_adapter.tuner.hooks.attention import reads_implementation

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "insert_layer": {"insert_layer": 1},
    "key_value": {"key_value": True},
    "neurons": {"init": "test_time", "register_neurons": {0: [1, 4]}},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["vit", "beit", "timm"])
def test_a_pass_inside_of_a_pass(name: str, way: str) -> None:
    if name == "timm":
        if way == "key_value":
            pytest.skip("timm has no attention interface")
        base, inputs = build_stack(name), {"x": images()}
    else:
        base, inputs = build(name), make_inputs(name)
        if way == "key_value" and not reads_implementation(find_tower(base)):
            pytest.skip(f"{name} does not go through the attention interface in this version of transformers")
    torch.manual_seed(0)
    model = add_registers(base, num_registers=3, **({"init_std": 1.0} if way != "neurons" else {}), **WAYS[way]).eval()
    other = {key: value[:1].flip(-1) for key, value in inputs.items()}
    expected, alone = run(model, inputs), run(model, other)
    with model.disable_adapter():
        base_alone = run(model, other)
    inside: list[Any] = []

    def again(*_: Any) -> None:
        if inside:
            return
        inside.append("running")
        inside.append(run(model, other))
        with model.disable_adapter():
            inside.append(run(model, other))
        with capture(model) as trace:
            run(model, other)
        inside.append(trace)
        with pytest.raises((ValueError, RuntimeError, AssertionError)):
            run(model, {key: value[:, :1] for key, value in other.items()})

    block = find_register_layer(model).tower.part("blocks")[0]
    handle = block.register_forward_hook(again)
    outer = run(model, inputs)
    handle.remove()
    assert_close(outer, expected)
    assert_close(inside[1], alone)
    assert_close(inside[2], base_alone)
    assert len(inside[3].hidden_states) > 1
    assert_close(run(model, inputs), expected, rtol=0, atol=0)


def test_inside_of_a_pass_with_adapters_by_image() -> None:
    """The pass inside has the active adapters, or names of its own, and a batch of another size."""
    torch.manual_seed(0)
    model = add_registers(build("vit"), num_registers=2, init_std=1.0).eval()
    inputs, names = make_inputs("vit"), ["default", "__base__"]
    other = {key: value[:1] for key, value in inputs.items()}
    expected, alone = run(model, inputs, adapter_names=names), run(model, other)
    base_alone = run(model, other, adapter_names=["__base__"])
    inside: list[Any] = []

    def again(*_: Any) -> None:
        if not inside:
            inside.append("running")
            inside.append(run(model, other))
            inside.append(run(model, other, adapter_names=["__base__"]))

    handle = find_register_layer(model).tower.part("blocks")[0].register_forward_hook(again)
    assert_close(run(model, inputs, adapter_names=names), expected)
    handle.remove()
    assert_close(inside[1], alone)
    assert_close(inside[2], base_alone)
    assert_close(run(model, inputs, adapter_names=names), expected)
