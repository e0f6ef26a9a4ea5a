"""The base model: the same bits with adapters off, the same keys while they are on, itself again after unload()."""

from __future__ import annotations

import pytest
import torch
from crossings import crossings
from families import CASES, FAMILIES, KINDS, TOWERS, build, make_inputs
from helpers import Snapshot, assert_identical, differs, hooks, run
from peft import LoraConfig, PeftModel, get_peft_model

from register_adapter import RegisterConfig, RegisterLayer, add_registers, find_register_layer

ASK = {"output_hidden_states": True, "output_attentions": True}


@pytest.mark.parametrize(("name", "attention"), crossings(CASES, ("eager", "sdpa"), whole=KINDS))
def test_disabled_registers_leave_the_base_bit_for_bit(name: str, attention: str) -> None:
    base, inputs = build(name, attention), make_inputs(name)
    ask = ASK if attention == "eager" else {"output_hidden_states": True}
    expected = run(base, inputs, **ask)
    model = add_registers(base, 4).eval()
    active = run(model, inputs, **ask)
    assert differs(active, expected)
    with model.disable_adapter():
        assert_identical(run(model, inputs, **ask), expected)
    assert_identical(run(model, inputs, **ask), active)


@pytest.mark.parametrize(("name", "precision"), crossings(FAMILIES, ("float32", "bfloat16")))
def test_unload_gives_back_the_very_base(name: str, precision: str) -> None:
    dtype = getattr(torch, precision)
    base, inputs = build(name, dtype=dtype), make_inputs(name, dtype=dtype)
    snapshot = Snapshot(base, inputs)
    model = add_registers(base, 4).eval()
    run(model, inputs, **{"output_hidden_states": True})
    assert model.unload() is base
    snapshot.check()


@pytest.mark.parametrize("name", FAMILIES)
def test_base_keys_keep_their_names_while_registers_are_attached(name: str) -> None:
    base = build(name)
    keys = list(base.state_dict())
    add_registers(base, 4)
    added = [key for key in base.state_dict() if key not in keys]
    assert [key for key in base.state_dict() if key in keys] == keys
    assert len(added) == 1
    assert added[0].endswith("registers.register_adapter_tokens.default.weight")


@pytest.mark.parametrize("name", TOWERS)
def test_a_base_checkpoint_loads_into_a_base_with_registers(name: str) -> None:
    base, inputs = build(name), make_inputs(name)
    expected = run(add_registers(base, 4).eval(), inputs)
    checkpoint = build(name).state_dict()
    with torch.no_grad():
        for parameter in build(name).parameters():
            parameter.zero_()
    result = base.load_state_dict(checkpoint, strict=False)
    assert not result.unexpected_keys
    assert len(result.missing_keys) == 1
    assert_identical(run(base, inputs), expected)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("classifier")])
def test_unload_takes_modules_to_save_away_too(name: str) -> None:
    base, inputs = build(name), make_inputs(name)
    snapshot = Snapshot(base, inputs)
    model = add_registers(base, 4, modules_to_save=["classifier"]).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter += 1
    model.unload()
    snapshot.check()


def test_registers_can_be_attached_again_after_unload() -> None:
    base, inputs = build("vit"), make_inputs("vit")
    snapshot = Snapshot(base, inputs)
    for _ in range(2):
        torch.manual_seed(0)
        first = run(add_registers(base, 4).eval(), inputs)
        torch.manual_seed(0)
        assert_identical(run(add_registers(add_registers_removed(base), 4).eval(), inputs), first)
        add_registers_removed(base)
    snapshot.check()


def add_registers_removed(base: torch.nn.Module) -> torch.nn.Module:
    """What unload() does, for a base whose PeftModel is no longer at hand."""
    find_register_layer(base).detach()
    del base.peft_config
    return base


def test_adding_to_a_base_that_carries_registers_adds_an_adapter() -> None:
    base, inputs = build("vit"), make_inputs("vit")
    first = add_registers(base, 4).eval()
    expected = run(first, inputs)
    second = add_registers(base, 2, adapter_name="other").eval()
    assert sum(isinstance(module, RegisterLayer) for module in base.modules()) == 1
    assert second.active_adapters == ["other"]
    find_register_layer(base).set_adapter("default")
    assert_identical(run(base, inputs), expected)


def test_adding_to_a_peft_model_is_refused_with_the_way_to_do_it() -> None:
    model = add_registers(build("vit"), 4).eval()
    snapshot = Snapshot(model, make_inputs("vit"))
    with pytest.raises(ValueError, match=r"add_adapter"):
        add_registers(model, 4, adapter_name="other")
    snapshot.check()


def test_a_second_unload_has_nothing_to_do() -> None:
    base, inputs = build("vit"), make_inputs("vit")
    snapshot = Snapshot(base, inputs)
    model = add_registers(base, 4)
    model.unload()
    assert model.unload() is base
    snapshot.check()


def test_deleting_the_last_adapter_leaves_no_hook() -> None:
    base, inputs = build("vit"), make_inputs("vit")
    snapshot = Snapshot(base, inputs)
    model = add_registers(base, 4).eval()
    model.delete_adapter("default")
    snapshot.check_values()
    assert hooks(base) == snapshot.hooks
    model.add_adapter("again", RegisterConfig(num_registers=2))
    model.set_adapter("again")
    assert differs(run(base, inputs), snapshot.outputs)
    model.unload()
    snapshot.check()


def test_merging_is_refused_and_changes_nothing() -> None:
    model = add_registers(build("vit"), 4).eval()
    snapshot = Snapshot(model, make_inputs("vit"))
    with pytest.raises(NotImplementedError, match=r"export_native"):
        model.merge_and_unload()
    with pytest.raises(NotImplementedError, match=r"cannot be merged"):
        model.merge_adapter()
    snapshot.check()


def test_lora_beside_registers_trains_and_unloads() -> None:
    base, inputs = build("vit"), make_inputs("vit")
    snapshot = Snapshot(base, inputs)
    base.add_adapter(RegisterConfig(num_registers=4), "registers")
    with_registers = run(base, inputs)
    assert differs(with_registers, snapshot.outputs)
    lora = LoraConfig(target_modules=["q_proj", "v_proj", "query", "value"], init_lora_weights=False)
    model = get_peft_model(base, lora).eval()
    assert differs(run(model, inputs), with_registers)
    merged = model.merge_and_unload()
    assert find_register_layer(merged) is not None
    assert differs(run(merged, inputs), snapshot.outputs)


def test_registers_go_into_a_model_that_has_lora() -> None:
    base, inputs = build("vit"), make_inputs("vit")
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)).eval()
    expected = run(lora, inputs)
    lora.base_model.model.add_adapter(RegisterConfig(num_registers=4), "registers")
    assert differs(run(lora, inputs), expected)
    assert isinstance(lora, PeftModel)
