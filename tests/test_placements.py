"""Where registers enter: a later block, every block, the attention; with a gate; image by image another adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from crossings import crossings
from families import BLOCKS, CASES, KINDS, TOWERS, WIDTH, build, make_inputs
from helpers import Snapshot, assert_identical, differs, run, shapes
from peft import PeftModel

from register_adapter import (
    RegisterConfig,
    UnsupportedModelError,
    add_registers,
    capture,
    find_register_layer,
    find_tower,
)
from register_adapter.tuner.hooks.attention import reads_implementation

#: Ways for registers to enter, all beside the default.
MODES: dict[str, dict[str, Any]] = {
    "insert_layer": {"insert_layer": 1},
    "deep": {"deep": True},
    "deep-late": {"deep": True, "insert_layer": 1},
    "key_value": {"key_value": True},
    "key_value-late": {"key_value": True, "insert_layer": 1},
    "gate": {"gate": -1.0},
    "gate-deep": {"gate": -1.0, "deep": True},
    "gate-key_value": {"gate": -1.0, "key_value": True},
    "neurons": {"register_neurons": {0: [0, 3, 7], 1: [5]}},
    "neurons-gate": {"register_neurons": {1: [0, 3, 7]}, "remove": "outliers", "insert_layer": 1, "gate": -1.0},
    "neurons-key_value": {"register_neurons": {0: [0, 3, 7]}, "remove": "mean", "key_value": True},
    "neurons-trained": {"register_neurons": {0: [0, 3, 7], 1: [5]}, "train_removal": True},
}
ASK = {"output_hidden_states": True}
#: A plain tower, one with position biases, one with rotary tables, one with a mask: every mode meets each.
OPPOSITES = [name for name in ("vit", "beit", "dinov3", "siglip2-vision") if name in TOWERS]
#: Every mode under both implementations for these, under one of them for the other kinds of anatomy.
OUTPUTS = sorted(
    {
        *crossings(OPPOSITES, MODES, ("eager", "sdpa"), whole=OPPOSITES),
        *crossings(crossings([name for name in TOWERS if name in KINDS], MODES, whole=KINDS), ("eager", "sdpa")),
        *crossings(TOWERS, MODES, ("eager", "sdpa"), each=2),
    }
)
HAS_INTERFACE = {name: reads_implementation(find_tower(build(name))) for name in {*TOWERS, "dinov2-classifier"}}


def attach(name: str, mode: str, attention: str = "sdpa", **options: Any) -> Any:
    """The model ``name`` with registers that enter in the way ``mode``; skipped where the model refuses it."""
    if ("key_value" in mode or "gate" in mode) and not HAS_INTERFACE[name]:
        pytest.skip(f"{name} does not go through the attention interface")
    return add_registers(build(name, attention), **{"init_std": 1.0, **MODES[mode], **options}).eval()


@pytest.mark.parametrize(("name", "mode", "attention"), OUTPUTS)
def test_outputs_have_the_shape_of_the_base(name: str, mode: str, attention: str) -> None:
    inputs = make_inputs(name)
    model = attach(name, mode, attention, num_registers=3)
    ask = {**ASK, **({"output_attentions": True} if attention == "eager" else {})}
    with model.disable_adapter():
        expected = run(model, inputs, **ask)
    outputs = run(model, inputs, **ask)
    assert shapes(outputs) == shapes(expected)
    assert differs(outputs, expected)
    with model.disable_adapter():
        assert_identical(run(model, inputs, **ask), run(build(name, attention), inputs, **ask))


@pytest.mark.parametrize(("name", "mode"), crossings(TOWERS, MODES, whole=OPPOSITES, each=3))
def test_registers_of_every_block_get_gradients_and_nothing_else_does(name: str, mode: str) -> None:
    model = attach(name, mode).train()
    output = model(**make_inputs(name))[CASES[name].output]
    last = output[-1] if isinstance(output, tuple | list) else output
    (last * torch.randn(last.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "register_adapter_" in key
            rows = parameter.grad.flatten(0, -2) if parameter.ndim > 2 else parameter.grad
            assert (rows != 0).any(-1).all(), f"{key} has rows without a gradient"
        else:
            assert parameter.grad is None


@pytest.mark.parametrize(("name", "mode"), crossings(TOWERS, MODES, whole=("vit",), each=3))
def test_unload_gives_back_the_very_base(name: str, mode: str) -> None:
    model = attach(name, mode)
    base = model.get_base_model()
    model.unload()
    snapshot = Snapshot(build(name), make_inputs(name))
    assert_identical(run(base, snapshot.inputs), snapshot.outputs)
    assert list(base.state_dict()) == list(snapshot.values)
    assert not any("registers" in module for module, _ in base.named_modules() if module.endswith("registers"))


@pytest.mark.parametrize(("name", "mode"), crossings(TOWERS, MODES, whole=("vit",), each=2))
def test_save_and_load(name: str, mode: str, tmp_path: Path) -> None:
    model, inputs = attach(name, mode), make_inputs(name)
    expected = run(model, inputs)
    model.save_pretrained(tmp_path)
    assert_identical(run(PeftModel.from_pretrained(build(name), tmp_path).eval(), inputs), expected)


@pytest.mark.parametrize(
    ("name", "mode"), crossings(["vit", "clip-vision", "dinov2-registers"], MODES, whole=("vit",), each=3)
)
def test_copies_are_independent(name: str, mode: str) -> None:
    model, inputs = attach(name, mode), make_inputs(name)
    expected = run(model, inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in find_register_layer(other).parameters():
            parameter.add_(1.0)
    assert differs(run(other, inputs), expected)
    assert_identical(run(model, inputs), expected)


def test_insert_layer_zero_is_the_default() -> None:
    inputs = make_inputs("vit")
    outputs = []
    for options in ({}, {"insert_layer": 0}):
        torch.manual_seed(0)
        outputs.append(run(add_registers(build("vit"), 3, **options).eval(), inputs))
    assert_identical(*outputs)


@pytest.mark.parametrize("insert_layer", range(BLOCKS))
def test_registers_are_absent_before_their_block(insert_layer: int) -> None:
    base, inputs = build("vit"), make_inputs("vit")
    with torch.no_grad(), capture(base) as plain:
        base(**inputs)
    model = add_registers(base, 3, insert_layer=insert_layer).eval()
    with torch.no_grad(), capture(model) as trace:
        model(**inputs)
    for index in range(BLOCKS + 1):
        count = trace.num_registers_at(index)
        assert count == (3 if max(index - 1, 0) >= insert_layer else 0)
        assert trace.hidden_states[index].shape[1] == plain.hidden_states[index].shape[1] + count
        assert trace.patches(index).shape == plain.patches(index).shape
        assert torch.equal(trace.patches(index), plain.patches(index)) == (index <= insert_layer)
    assert trace.registers.shape == (2, 3, WIDTH)


def test_blocks_before_the_registers_save_no_activations() -> None:
    model, inputs = add_registers(build("vit"), 3, insert_layer=1).train(), make_inputs("vit")
    with capture(model, attentions=False) as trace:
        model(**inputs)
    assert not trace.hidden_states[1].requires_grad
    assert trace.hidden_states[2].requires_grad


def _projected(name: str, deep: Any) -> torch.Tensor:
    """Key/value pairs that say in every block what the deep registers of a ViT say: ``(blocks, 2, R, D)``."""
    tower = find_tower(build(name))
    pairs = []
    for block, registers in zip(tower.part("blocks"), deep, strict=True):
        normed = block.layernorm_before(registers)
        attention = block.attention
        # Named so, and a level deeper, in transformers 4.
        key, value = (
            (attention.k_proj, attention.v_proj)
            if hasattr(attention, "k_proj")
            else (attention.attention.key, attention.attention.value)
        )
        pairs.append(torch.stack([key(normed), value(normed)]))
    return torch.stack(pairs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("gate", [None, -0.7])
def test_deep_registers_are_key_value_pairs_for_the_other_tokens(attention: str, gate: float | None) -> None:
    """Nothing reads a deep register but its own block's attention, so its projections do the same."""
    inputs = make_inputs("vit")
    tokens = add_registers(build("vit", attention), 3, deep=True, init_std=1.0, gate=gate).eval()
    pairs = add_registers(build("vit", attention), 3, key_value=True, gate=gate).eval()
    weights = [find_register_layer(model).tokens("default").weight for model in (tokens, pairs)]
    with torch.no_grad():
        weights[1].copy_(_projected("vit", weights[0]))
    expected, outputs = run(tokens, inputs), run(pairs, inputs)
    torch.testing.assert_close(outputs["last_hidden_state"], expected["last_hidden_state"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "attention"), crossings([name for name in TOWERS if HAS_INTERFACE[name]], ("eager", "sdpa"), whole=KINDS)
)
def test_a_gate_of_zero_does_nothing_and_a_closed_one_gives_the_base(name: str, attention: str) -> None:
    inputs = make_inputs(name)
    outputs = {}
    for gate in (None, 0.0, -1e4):
        torch.manual_seed(0)
        outputs[gate] = run(add_registers(build(name, attention), 3, gate=gate).eval(), inputs)["last_hidden_state"]
    torch.testing.assert_close(outputs[0.0], outputs[None], rtol=0, atol=1e-5)
    base = run(build(name, attention), inputs)["last_hidden_state"]
    torch.testing.assert_close(outputs[-1e4], base, rtol=0, atol=1e-5)
    assert (outputs[None] - base).abs().max() > 1e-4


def test_attention_maps_of_pairs() -> None:
    inputs = make_inputs("vit")
    full = add_registers(build("vit", "eager"), 3, key_value=True, attentions="full").eval()
    maps = run(full, inputs, output_attentions=True)["attentions.0"]
    length = run(build("vit"), inputs)["last_hidden_state"].shape[1]
    assert maps.shape[-2:] == (length, length + 3)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    sliced = add_registers(build("vit", "eager"), 3, key_value=True).eval()
    with torch.no_grad(), capture(sliced) as trace:
        sliced(**inputs)
    assert trace.attentions[0].shape == maps.shape
    assert trace.num_registers == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"deep": True}, {"key_value": True}, {"gate": -1.0}], ids=str)
@pytest.mark.parametrize("name", ["vit", "clip-vision", "dinov2-registers", "siglip-vision", "dinov2-classifier"])
def test_every_image_of_a_batch_with_an_adapter_of_its_own(name: str, options: dict[str, Any], attention: str) -> None:
    """Adapters of different sizes and none in one batch: what each image gives alone."""
    base, inputs = build(name, attention), make_inputs(name, batch=4)
    model = add_registers(base, 2, adapter_name="two", init_std=1.0, **options)
    model.add_adapter("five", RegisterConfig(num_registers=5, init_std=1.0, **options))
    model.eval()
    names = ["five", "__base__", "two", "five"]
    outputs = run(model, {**inputs, "adapter_names": names}, **ASK)
    for index, adapter in enumerate(names):
        alone = {key: value[index : index + 1] for key, value in inputs.items()}
        if adapter == "__base__":
            with model.disable_adapter():
                expected = run(model, alone, **ASK)
        else:
            model.set_adapter(adapter)
            expected = run(model, alone, **ASK)
        for key, value in expected.items():
            torch.testing.assert_close(outputs[key][index : index + 1], value, rtol=1e-4, atol=2e-5, msg=key)
    with model.disable_adapter():
        assert_identical(run(model, inputs), run(build(name, attention), inputs))


def test_bad_adapter_names_are_refused_and_change_nothing() -> None:
    model = add_registers(build("vit"), 2, adapter_name="one")
    model.add_adapter("late", RegisterConfig(num_registers=2, insert_layer=1))
    inputs = make_inputs("vit")
    with pytest.raises(ValueError, match=r"training mode|for inference"):
        model.train()(**inputs, adapter_names=["one", "one"])
    snapshot = Snapshot(model.eval(), inputs)
    with pytest.raises(ValueError, match=r"other.*'one'"):
        model(**inputs, adapter_names=["one", "other"])
    with pytest.raises(ValueError, match="different places"):
        model(**inputs, adapter_names=["one", "late"])
    with pytest.raises(ValueError, match="3 names for a batch of 2"):
        model(**inputs, adapter_names=["one"] * 3)
    snapshot.check()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"insert_layer": BLOCKS}, ValueError, f"insert_layer={BLOCKS} is not a block of ViTModel, which has {BLOCKS}"),
        ({"insert_layer": -1}, ValueError, "at least 0"),
        ({"insert_layer": True}, TypeError, "insert_layer must be int"),
        ({"deep": 1}, TypeError, "deep must be bool"),
        ({"deep": True, "key_value": True}, ValueError, "choose one"),
        ({"key_value": True, "init": "cls"}, ValueError, "for tokens"),
        ({"gate": float("inf")}, ValueError, "finite"),
    ],
    ids=str,
)
def test_bad_options_are_refused_and_change_nothing(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    base = build("vit")
    snapshot = Snapshot(base, make_inputs("vit"))
    with pytest.raises(error, match=match):
        add_registers(base, 2, **options)
    snapshot.check()


@pytest.mark.parametrize("mode", ["key_value", "gate"])
def test_a_model_without_the_attention_interface_is_refused_by_name(mode: str) -> None:
    refusing = [name for name in TOWERS if not HAS_INTERFACE[name]]
    if not refusing:
        pytest.skip("every family of the installed transformers goes through the interface")
    base = build(refusing[0])
    snapshot = Snapshot(base, make_inputs(refusing[0]))
    with pytest.raises(UnsupportedModelError, match=f"{mode} needs a model whose attention"):
        add_registers(base, 2, **MODES[mode])
    snapshot.check()
