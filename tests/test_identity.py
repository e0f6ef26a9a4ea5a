"""The identity of a base: the same through all that people do to its weights, another for other weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from crossings import crossings
from families import PATCH, TOWERS, WIDTH, build, make_inputs, perturb
from helpers import Snapshot, assert_identical, run
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from register_adapter import BaseModelMismatchError, RegisterConfig, add_registers, find_tower
from register_adapter.towers import TowerIdentity
from register_adapter.towers.identity import TOLERANCE, _biases, fingerprint


def distance(model: nn.Module, other: nn.Module) -> float:
    first, second = fingerprint(find_tower(model)), fingerprint(find_tower(other))
    assert first is not None
    assert second is not None
    assert len(first) == len(second)
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def rounded_to_int8(model: nn.Module) -> nn.Module:
    """The weights of linear layers rounded as int8 quantisation by row does."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                scale = module.weight.abs().amax(dim=1, keepdim=True) / 127
                module.weight.copy_((module.weight / scale).round() * scale)
    return model


def quantized(model: nn.Module) -> nn.Module:
    """The linear layers replaced by torch's int8 ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result: nn.Module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in result.modules())
    return result


CHANGES: dict[str, Any] = {
    "bfloat16": lambda model: copy.deepcopy(model).to(torch.bfloat16),
    "float16": lambda model: copy.deepcopy(model).to(torch.float16),
    "float64": lambda model: copy.deepcopy(model).to(torch.float64),
    "int8 weights": rounded_to_int8,
    "int8 layers": quantized,
    "frozen": lambda model: copy.deepcopy(model).requires_grad_(False),
}


@pytest.mark.parametrize(("name", "change"), crossings(TOWERS, CHANGES, whole=("vit", "dinov3", "beit"), each=3))
def test_it_survives_what_keeps_the_weights(name: str, change: str) -> None:
    base = build(name)
    assert distance(base, CHANGES[change](base)) < TOLERANCE / 2
    assert not TowerIdentity.of(find_tower(base)).differences(TowerIdentity.of(find_tower(CHANGES[change](base))))


@pytest.mark.parametrize("name", TOWERS)
def test_it_survives_lora_and_registers_beside_it(name: str) -> None:
    base = build(name)
    before = fingerprint(find_tower(base))
    names = {child.rpartition(".")[2] for child, module in base.named_modules() if isinstance(module, nn.Linear)}
    lora = get_peft_model(base, LoraConfig(target_modules=sorted(names), lora_bias=True, init_lora_weights=False))
    assert fingerprint(find_tower(lora)) == before
    add_registers(lora.unload(), 4)
    assert fingerprint(find_tower(base)) == before


@pytest.mark.parametrize(("name", "seed"), crossings(TOWERS, range(100, 105), whole=("vit",), each=2))
def test_it_differs_for_fine_tuned_weights(name: str, seed: int) -> None:
    """Five per cent of noise on every weight, relative to the tensor's spread."""
    base = build(name)
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.05 * parameter.square().mean().sqrt() * noise
    assert distance(base, tuned) > TOLERANCE


@pytest.mark.parametrize("name", TOWERS)
def test_it_differs_for_another_initialisation(name: str) -> None:
    base = build(name)
    other = copy.deepcopy(base)
    perturb(other, seed=3)
    assert distance(base, other) > 5 * TOLERANCE


@pytest.mark.parametrize("part", ["patch_embedding", "position_embedding"])
def test_it_sees_a_change_of_one_part(part: str) -> None:
    base = build("vit")
    component = find_tower(base).part(part)
    weight = component if isinstance(component, torch.Tensor) else component.weight
    before = fingerprint(find_tower(base))
    with torch.no_grad():
        weight += 0.1 * weight.std() * torch.randn(weight.shape)
    after = fingerprint(find_tower(base))
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > TOLERANCE


def test_weights_that_are_not_at_hand_are_not_compared() -> None:
    base = build("vit")
    identity = TowerIdentity.of(find_tower(base.to("meta")))
    assert identity.fingerprint is None
    assert identity.differences(TowerIdentity.of(find_tower(build("vit")))) == []


class FourBits(torch.Tensor):
    """What a quantiser puts in a weight's place."""


def with_four_bits(model: nn.Module) -> nn.Module:
    """The patch embedding as optimum-quanto leaves it: a weight of its own class, rounded to 15 steps."""
    model = copy.deepcopy(model)
    layer = find_tower(model).part("patch_embedding")
    scale = layer.weight.detach().abs().amax() / 7
    layer.weight = nn.Parameter(((layer.weight.detach() / scale).round() * scale).as_subclass(FourBits))
    assert type(layer.weight) is FourBits
    return model


@pytest.mark.parametrize("saved", ["float", "four bits"])
@pytest.mark.parametrize("loaded", ["float", "four bits"])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_quantised_patch_embedding_makes_no_other_base(name: str, saved: str, loaded: str, tmp_path: Path) -> None:
    base, other = build(name), build(name)
    perturb(base, seed=1)
    perturb(other, seed=2)
    change = {"float": copy.deepcopy, "four bits": with_four_bits}
    add_registers(change[saved](base)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(change[loaded](base), str(tmp_path))
    with pytest.raises(BaseModelMismatchError, match="differ in weights"):
        PeftModel.from_pretrained(change[loaded](other), str(tmp_path))


def test_it_says_what_the_tower_is() -> None:
    identity = TowerIdentity.of(find_tower(build("clip")))
    assert (identity.family, identity.hidden_size, identity.num_hidden_layers) == ("clip", WIDTH, 2)
    assert identity.patch_size == PATCH
    assert str(identity).startswith("clip (2 blocks of width 32, patch 8, weights ")


@pytest.mark.parametrize(
    "change",
    # torch's own int8 layers cannot load any part of a state-dict, which is how PEFT loads every method.
    [change for change in CHANGES if change not in ("float64", "frozen", "int8 layers")],
)
def test_an_adapter_loads_into_the_changed_base(change: str, tmp_path: Path) -> None:
    add_registers(build("vit"), 4).save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(CHANGES[change](build("vit")), str(tmp_path))
    dtype = getattr(torch, change, torch.float32)
    assert torch.isfinite(run(loaded, make_inputs("vit", dtype=dtype))["last_hidden_state"]).all()


def test_another_base_is_refused_and_both_are_named(tmp_path: Path) -> None:
    donor = build("vit")
    donor.name_or_path = "me/the-right-base"
    add_registers(donor, 4).save_pretrained(str(tmp_path))
    other = build("vit")
    perturb(other, seed=3)
    snapshot = Snapshot(other, make_inputs("vit"))
    for load in (lambda: PeftModel.from_pretrained(other, str(tmp_path)), lambda: other.load_adapter(str(tmp_path))):
        with pytest.raises(BaseModelMismatchError) as caught:
            load()
        text = str(caught.value)
        assert text.count("vit (2 blocks of width 32, patch 8, weights ") == 2
        assert "me/the-right-base" in text
        assert "differ in weights" in text
        assert "ignore_base_mismatch=True" in text
        if getattr(other, "_hf_peft_config_loaded", False):  # transformers sets its flag before it tries
            other._hf_peft_config_loaded = False
        snapshot.check()


def test_the_override_loads_into_another_base(tmp_path: Path) -> None:
    trained = add_registers(build("vit"), 4)
    trained.save_pretrained(str(tmp_path))
    other = build("vit")
    perturb(other, seed=3)
    loaded = PeftModel.from_pretrained(other, str(tmp_path), ignore_base_mismatch=True)
    loaded.save_pretrained(str(tmp_path / "again"))
    again = RegisterConfig.from_pretrained(str(tmp_path / "again"))
    assert again.identity == trained.peft_config["default"].identity, "still the base it was trained for"
    assert not again.ignore_base_mismatch


def test_no_override_makes_another_width_fit(tmp_path: Path) -> None:
    import transformers as tf

    add_registers(build("vit"), 4).save_pretrained(str(tmp_path))
    wide = tf.ViTModel(
        tf.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    )
    for options in ({}, {"ignore_base_mismatch": True}):
        with pytest.raises(BaseModelMismatchError, match=r"width 32.*width 64.*hidden_size.*can never fit"):
            PeftModel.from_pretrained(wide, str(tmp_path), **options)


@pytest.mark.parametrize(
    ("saved", "given"), [("vit", "deit"), ("dinov2", "dinov2-registers"), ("clip-vision", "siglip-vision")]
)
def test_another_family_is_refused(saved: str, given: str, tmp_path: Path) -> None:
    add_registers(build(saved), 4).save_pretrained(str(tmp_path))
    base = build(given)
    expected = run(base, make_inputs(given))
    with pytest.raises(BaseModelMismatchError, match="differ in family"):
        PeftModel.from_pretrained(base, str(tmp_path))
    assert_identical(run(base, make_inputs(given)), expected)


def test_one_config_serves_two_bases() -> None:
    config = RegisterConfig(num_registers=2)
    models = [get_peft_model(build(name), config) for name in ("vit", "dinov2")]
    assert [model.peft_config["default"].identity.family for model in models] == ["vit", "dinov2"]


def test_the_config_of_an_attached_adapter_makes_fresh_registers() -> None:
    model = add_registers(build("vit"), 4).eval()
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    model.train()
    assert model(**make_inputs("vit")).last_hidden_state.requires_grad


def test_the_fingerprint_is_the_same_where_transformers_4_lists_the_mlp_before_the_norms() -> None:
    parts = {"attention": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "first": nn.Linear(4, 8), "second": nn.Linear(8, 4)}
    newer, older = nn.Module(), nn.Module()
    newer.attention, newer.layernorm_before, newer.mlp = parts["attention"], parts["norm"], nn.Module()
    newer.mlp.fc1, newer.mlp.fc2 = parts["first"], parts["second"]
    older.attention, older.intermediate, older.output = parts["attention"], nn.Module(), nn.Module()
    older.intermediate.dense, older.output.dense = parts["first"], parts["second"]
    older.layernorm_before = parts["norm"]
    listed = [[id(bias) for bias in _biases(nn.ModuleList([block]))] for block in (newer, older)]
    assert listed[0] == listed[1] == [id(part.bias) for part in parts.values()]
