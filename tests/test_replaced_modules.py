"""Modules with hooks that somebody replaces, and what registers hand to the code around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import assert_identical, run
from processes import run_script
from stacks_cases import build_stack, images
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from register_adapter import (
    RegisterPeftModel,
    UnsupportedModelError,
    add_registers,
    find_register_layer,
    find_tower,
)


def replace(model: nn.Module, field: str, make: Callable[[nn.Module], nn.Module]) -> None:
    tower = find_tower(model)
    place, _, name = getattr(tower.anatomy, field).rpartition(".")
    setattr(tower.module.get_submodule(place), name, make(tower.part(field)))


@pytest.mark.parametrize("options", [{}, {"insert_layer": 1}], ids=str)
@pytest.mark.parametrize("make", [lambda old: nn.Identity(), copy.copy, copy.deepcopy], ids=["other", "copy", "deep"])
@pytest.mark.parametrize("name", ["vit", "timm"])
def test_a_replaced_norm_gets_the_hooks(name: str, make: Any, options: dict[str, Any]) -> None:
    base, inputs = (build(name), make_inputs(name)) if name == "vit" else (build_stack(name), {"x": images()})
    model = add_registers(base, 3, init_std=1.0, **options).eval()
    replaced = copy.deepcopy(model).unload()
    replace(replaced, "remove", make)
    again = add_registers(replaced, 3, **options).eval()
    with torch.no_grad():
        find_register_layer(again).tokens("default").weight.copy_(find_register_layer(model).tokens("default").weight)
    replace(base, "remove", make)
    assert_identical(run(model, inputs), run(again, inputs))


def test_registers_that_do_not_come_out_are_an_error() -> None:
    model, inputs = add_registers(build("vit"), 3).eval(), make_inputs("vit")
    tower = find_tower(model)
    # Behind the start of the pass, where hooks are renewed.
    tower.part("blocks")[0].register_forward_pre_hook(
        lambda module, args: replace(model, "remove", lambda old: nn.Identity())
    )
    with pytest.raises(UnsupportedModelError, match="did not leave it at 'layernorm'"):
        model(**inputs)


@pytest.mark.parametrize("options", [{}, {"insert_layer": 1}, {"register_neurons": {1: [3]}}], ids=str)
@pytest.mark.parametrize(
    "stack",
    ["timm", "timm-avg", "timm-no-class", "eva02", "dinov3-timm", "features_only", "open_clip-avg", "torchvision"],
)
def test_tracing_by_fx_is_refused(stack: str, options: dict[str, Any]) -> None:
    """Also where registers enter and leave at layers of torch, whose hooks do not run while they are recorded."""
    pytest.importorskip("torchvision.models.feature_extraction", reason="traces with torch.fx")
    model = add_registers(build_stack(stack), 3, **options).eval()
    with pytest.raises(UnsupportedModelError, match=r"torch\.fx is tracing"):
        torch.fx.symbolic_trace(find_tower(model).module)


@pytest.mark.parametrize("options", [{}, {"deep": True}, {"key_value": True}, {"gate": -1.0}], ids=str)
def test_registers_enter_as_a_copy_of_their_parameter(options: dict[str, Any]) -> None:
    """FSDP and the FLOP counter allow no view of a parameter to leave the module that owns it."""
    model, inputs = add_registers(build("vit"), 3, **options), make_inputs("vit")
    weight = find_register_layer(model).tokens("default").weight
    block = None if not options or "gate" in options else 0
    assert not find_register_layer(model).tokens("default")(weight, block)._is_view()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert counter.get_total_flops() > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"key_value": True}, {"gate": -1.0}], ids=str)
def test_a_pickled_model_runs_in_another_process(options: dict[str, Any], tmp_path: Path) -> None:
    model = add_registers(build("vit", "sdpa"), 3, init_std=1.0, **options).eval()
    inputs = make_inputs("vit")
    torch.save((model, inputs), tmp_path / "model.pt")
    run_script("run_pickled_model", tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "hidden.pt"), run(model, inputs)["last_hidden_state"])


@pytest.mark.slow
def test_the_first_pass_of_a_loaded_trainable_adapter_is_one_graph(tmp_path: Path) -> None:
    add_registers(build("vit"), 3, init_std=1.0).save_pretrained(tmp_path)
    inputs = make_inputs("vit")
    expected = run(RegisterPeftModel.from_pretrained(build("vit"), tmp_path), inputs)["last_hidden_state"]
    model = RegisterPeftModel.from_pretrained(build("vit"), tmp_path, is_trainable=True)
    torch._dynamo.reset()
    hidden = torch.compile(model, fullgraph=True, backend="eager")(**inputs).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
