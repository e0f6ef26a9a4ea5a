"""Which base an adapter belongs to is settled when it is saved: weights may be loaded after registers were attached."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs, perturb
from helpers import assert_identical, run
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from stacks_cases import build_stack
from torch import nn

from register_adapter import (
    BaseModelMismatchError,
    PositionConfig,
    RegisterConfig,
    add_registers,
    compose,
    find_tower,
    load_adapters,
    save_adapters,
)
from register_adapter.towers import TowerIdentity


def brought(lora: LoraConfig) -> LoraConfig:
    """The config, unless this PEFT leaves its trained biases out of what it saves."""
    saved = get_peft_model_state_dict(get_peft_model(build("vit"), copy.deepcopy(lora)))
    if not any(key.endswith("bias") for key in saved):
        pytest.skip("PEFT 0.18 saves no biases of lora_only")
    return lora


def other(name: str = "vit", make: Callable[[str], Any] = build) -> Any:
    """The same architecture with other weights, as before a checkpoint is loaded."""
    model = make(name)
    perturb(model, seed=3)
    return model


def _add_registers(base: Any) -> tuple[Any, Callable[[Path], Any]]:
    model = add_registers(base, 2)
    return base, model.save_pretrained


def _get_peft_model(base: Any) -> tuple[Any, Callable[[Path], Any]]:
    model = get_peft_model(base, RegisterConfig(num_registers=2))
    return base, model.save_pretrained


def _add_adapter(base: Any) -> tuple[Any, Callable[[Path], Any]]:
    base.add_adapter(RegisterConfig(num_registers=2))
    return base, base.save_pretrained


def _compose(base: Any) -> tuple[Any, Callable[[Path], Any]]:
    model = compose(base, {"registers": RegisterConfig(num_registers=2)})
    return base, lambda folder: save_adapters(model, folder)


WAYS = {"add_registers": _add_registers, "get_peft_model": _get_peft_model, "add_adapter": _add_adapter}


@pytest.mark.parametrize("way", [*WAYS, "compose"])
def test_weights_that_are_loaded_after_wrapping_are_the_base(way: str, tmp_path: Path) -> None:
    base, save = {**WAYS, "compose": _compose}[way](other())
    loaded = base.load_state_dict(build("vit").state_dict(), strict=False)
    assert not loaded.unexpected_keys
    save(tmp_path)
    load = load_adapters if way == "compose" else PeftModel.from_pretrained
    load(build("vit"), str(tmp_path))
    with pytest.raises(BaseModelMismatchError, match="weights"):
        load(other(), str(tmp_path))


@pytest.mark.parametrize("name", ["timm", "dinov3-timm", "open_clip", "torchvision", "hub"])
def test_they_are_in_models_of_other_libraries_too(name: str, tmp_path: Path) -> None:
    model = add_registers(other(name, build_stack), 2)
    model.get_base_model().load_state_dict(build_stack(name).state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(build_stack(name), str(tmp_path))
    with pytest.raises(BaseModelMismatchError, match="weights"):
        PeftModel.from_pretrained(other(name, build_stack), str(tmp_path))


def test_a_checkpoint_of_the_whole_wrapped_model_brings_its_base(tmp_path: Path) -> None:
    """As Lightning does it: the same code builds the model on other random weights, and loads everything."""
    trained = add_registers(build("vit"), 2, init_std=1.0)
    again = add_registers(other(), 2)
    again.load_state_dict(trained.state_dict())
    again.save_pretrained(tmp_path)
    PeftModel.from_pretrained(build("vit"), str(tmp_path))


def test_a_copy_of_a_model_has_a_base_of_its_own(tmp_path: Path) -> None:
    first = add_registers(build("vit"), 2)
    second = copy.deepcopy(first)
    second.get_base_model().load_state_dict(other().state_dict(), strict=False)
    for name, model in (("second", second), ("first", first)):
        model.save_pretrained(tmp_path / name)
    PeftModel.from_pretrained(other(), str(tmp_path / "second"))
    PeftModel.from_pretrained(build("vit"), str(tmp_path / "first"))


def test_an_override_keeps_the_base_until_there_is_another(tmp_path: Path) -> None:
    add_registers(build("vit"), 2).save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(other(), str(tmp_path / "saved"), ignore_base_mismatch=True)
    loaded.save_pretrained(tmp_path / "as it was")
    PeftModel.from_pretrained(build("vit"), str(tmp_path / "as it was"))
    perturb(loaded.get_base_model(), seed=5)
    loaded.save_pretrained(tmp_path / "changed")
    with pytest.raises(BaseModelMismatchError, match="weights"):
        PeftModel.from_pretrained(build("vit"), str(tmp_path / "changed"))


# What is no other base


def resampled(model: Any, size: int = 25) -> Any:
    """Position embeddings of another number of patches."""
    embeddings = model.embeddings
    old = embeddings.position_embeddings.detach()
    patches = nn.functional.interpolate(old[:, 1:].transpose(1, 2), size=size, mode="linear").transpose(1, 2)
    embeddings.position_embeddings = nn.Parameter(torch.cat([old[:, :1], patches], dim=1))
    return model


def test_resampled_positions_are_no_other_base(tmp_path: Path) -> None:
    add_registers(build("vit"), 2).save_pretrained(tmp_path / "before")
    PeftModel.from_pretrained(resampled(build("vit")), str(tmp_path / "before"))
    model = add_registers(build("vit"), 2)
    resampled(model.get_base_model())
    model.save_pretrained(tmp_path / "after")
    PeftModel.from_pretrained(build("vit"), str(tmp_path / "after"))
    with pytest.raises(BaseModelMismatchError, match="weights"):
        PeftModel.from_pretrained(resampled(other()), str(tmp_path / "after"))


def test_timms_other_image_size_is_no_other_base(tmp_path: Path) -> None:
    model = add_registers(build_stack("timm"), 2)
    model.get_base_model().set_input_size(img_size=48)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(build_stack("timm"), str(tmp_path))


def test_positions_decide_where_nothing_else_is_known() -> None:
    identity = TowerIdentity("mine", 8, 1, None, [*[0.0] * 8, *[0.5] * 8, *[0.0] * 8])
    assert identity.differences(TowerIdentity("mine", 8, 1, None, [*[0.0] * 8, *[-0.5] * 8, *[0.0] * 8])) == ["weights"]


def test_fingerprints_of_older_releases_are_compared_by_the_same_parts(tmp_path: Path) -> None:
    add_registers(build("vit"), 2).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    assert len(config["base_tower"]["fingerprint"]) == 24
    config["base_tower"]["fingerprint"][8:16] = [0.7] * 8
    path.write_text(json.dumps(config), "utf-8")
    PeftModel.from_pretrained(build("vit"), str(tmp_path))
    config["base_tower"]["fingerprint"][16:] = [0.7] * 8
    path.write_text(json.dumps(config), "utf-8")
    with pytest.raises(BaseModelMismatchError):
        PeftModel.from_pretrained(build("vit"), str(tmp_path))


@pytest.mark.parametrize("beside", ["norms", "lora_bias", "registers"])
@pytest.mark.parametrize("kept", ["registers", "positions"])
def test_blocks_that_are_loaded_after_wrapping_are_the_base(kept: str, beside: str, tmp_path: Path) -> None:
    """The patch embedding is the same; adapters that have biases of their own train none of the base's."""
    attention = ["query", "q_proj"]
    others: dict[str, Any] = {
        "norms": LNTuningConfig(target_modules=["layernorm_before"]),
        "lora_bias": LoraConfig(target_modules=attention, lora_bias=True),
        "registers": RegisterConfig(num_registers=2),
    }
    first = PositionConfig() if kept == "positions" else RegisterConfig(num_registers=2)
    base, expected = build("vit"), build("vit")
    model = compose(base, {"first": first, "second": PositionConfig() if kept == beside else others[beside]})
    for each in (base, expected):
        with torch.no_grad():
            biases = [value for key, value in each.named_parameters() if key.endswith("layernorm_after.bias")]
            for place, value in enumerate(biases):
                value += (-0.3, 0.5)[place % 2]
    assert TowerIdentity.of(find_tower(base)).differences(TowerIdentity.of(find_tower(build("vit")))) == ["weights"]
    save_adapters(model, tmp_path)
    load_adapters(expected, tmp_path)
    with pytest.raises(BaseModelMismatchError):
        load_adapters(build("vit"), tmp_path)


@pytest.mark.parametrize(
    "kinds",
    [(PositionConfig,), (RegisterConfig,), (RegisterConfig, PositionConfig)],
    ids=["positions", "registers", "both"],
)
def test_biases_that_came_from_a_file_are_no_other_base(kinds: tuple[Any, ...], tmp_path: Path) -> None:
    """They are frozen when loaded to be used; the model is saved again, and its adapters' values loaded over them."""
    lora = LoraConfig(target_modules=["query", "q_proj"], bias="all")
    first: Any = compose(build("vit"), {kind.__name__: kind() for kind in kinds} | {"lora": lora})
    for value in first.parameters():
        if value.requires_grad:
            nn.init.normal_(value, std=0.2)
    save_adapters(first, tmp_path / "first")
    loaded: Any = load_adapters(build("vit"), tmp_path / "first")
    save_adapters(loaded, tmp_path / "again")
    again: Any = load_adapters(build("vit"), tmp_path / "again")
    for kind in kinds:
        again.load_adapter(tmp_path / "first" / kind.__name__, kind.__name__)
    expected = first.eval().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("merged", [False, True])
def test_what_another_adapter_trains_is_no_other_base(merged: bool, tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["query", "q_proj"], bias="all")
    model = compose(build("vit"), {"registers": RegisterConfig(num_registers=2), "lora": lora})
    with torch.no_grad():
        for key, value in model.named_parameters():
            value += 0.3 * (value.requires_grad or ("layers" in key and key.endswith("bias")))
    if merged:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.merge()
    model.requires_grad_(False)
    save_adapters(model, tmp_path)
    again = load_adapters(build("vit"), tmp_path)
    save_adapters(again, tmp_path / "again")
    load_adapters(build("vit"), tmp_path / "again")


@pytest.mark.parametrize("name", ["patch_embeddings", "layers.1", "mlp"])
@pytest.mark.slow
def test_a_trained_copy_of_a_part_is_no_other_base(name: str, tmp_path: Path) -> None:
    if not any(path.endswith(name) for path, _ in build("vit").named_modules()):
        name = {"layers.1": "layer.1", "mlp": "intermediate"}[name]  # transformers 4
    model = add_registers(build("vit"), 2, modules_to_save=[name])
    with torch.no_grad():
        for value in model.parameters():
            value += 0.3 * value.requires_grad
    own = TowerIdentity.of(find_tower(build("vit")))
    assert not TowerIdentity.of(find_tower(model.get_base_model())).differences(own)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(build("vit"), str(tmp_path))


def test_weights_that_are_not_at_hand_leave_the_base_as_it_was(tmp_path: Path) -> None:
    model = add_registers(build("vit"), 2)
    projection = model.get_base_model().embeddings.patch_embeddings.projection
    projection.weight = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(build("vit"), str(tmp_path))


def test_blocks_that_were_cut_off_are_not_in_the_base() -> None:
    model = add_registers(build_stack("timm"), 2)
    base = model.get_base_model()
    base.blocks = base.blocks[:1]
    find_tower(base).module.registers.renew_bases()
    assert model.peft_config["default"].identity.num_hidden_layers == 1


class _Packed(nn.Module):
    """A convolution as a quantiser of somebody's own may hold it: no ``weight``."""

    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__()
        self.stride = inner.stride
        self.register_buffer("kernel", inner.weight.detach())
        self.register_buffer("bias", inner.bias.detach())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(images, self.kernel, self.bias, self.stride)


def test_a_patch_embedding_that_shows_no_weight_is_no_other_base(tmp_path: Path) -> None:
    model = add_registers(build_stack("timm"), 2)
    before = model.peft_config["default"].base_tower
    patches = model.get_base_model().patch_embed
    patches.proj = _Packed(patches.proj)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_tower"] == before
    PeftModel.from_pretrained(build_stack("timm"), str(tmp_path))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("kind", [RegisterConfig, PositionConfig])
@pytest.mark.parametrize("before", ["loaded", "trained here"])
def test_what_was_put_on_beside_trained_biases_loads_on_the_base(
    before: str, kind: Any, bias: Any, tmp_path: Path
) -> None:
    def trained(model: Any) -> Any:
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    lora = brought(LoraConfig(target_modules=["q_proj", "query"], bias=bias))
    model = trained(compose(build("vit"), {"lora": lora}))
    if before == "loaded":
        model.save_pretrained(tmp_path / "lora")
        model = load_adapters(build("vit"), tmp_path / "lora")
    model.add_adapter("other", kind())
    trained(model)
    expected = run(model.eval(), make_inputs("vit"))
    model.save_pretrained(tmp_path / "0")
    for number in range(2):
        loaded = load_adapters(build("vit"), tmp_path / str(number)).eval()
        assert_identical(run(loaded, make_inputs("vit")), expected)
        loaded.save_pretrained(tmp_path / str(number + 1))
        in_turns = build("vit")
        for name in ("lora", "other"):
            in_turns = load_adapters(in_turns, tmp_path / str(number), selected_adapters=[name])
        assert_identical(run(in_turns.eval(), make_inputs("vit")), expected)
    patches = build("vit")
    for key, value in patches.named_parameters():
        if "patch_embeddings" in key:
            value.data += torch.linspace(-1, 1, value.numel()).reshape(value.shape)
    state = {key: value.clone() for key, value in patches.state_dict().items()}
    with pytest.raises(BaseModelMismatchError, match="they differ in weights"):
        load_adapters(patches, tmp_path / "0")
    assert patches.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in patches.state_dict().items())


@pytest.mark.parametrize("names", [("lora", "other"), ("other", "lora")], ids="-".join)
@pytest.mark.parametrize("kind", [RegisterConfig, PositionConfig])
def test_what_is_put_on_together_with_trained_biases_knows_those_of_the_base(
    kind: Any, names: tuple[str, ...], tmp_path: Path
) -> None:
    configs = {"lora": LoraConfig(target_modules=["q_proj", "query"], bias="all"), "other": kind()}
    compose(build("vit"), {name: configs[name] for name in names}).save_pretrained(tmp_path)
    biases = build("vit")
    for key, value in biases.named_parameters():
        if key.endswith("bias"):
            value.data += torch.linspace(-1, 1, value.numel())
    with pytest.raises(BaseModelMismatchError, match="they differ in weights"):
        load_adapters(biases, tmp_path)


def _trained(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _added_afterwards(configs: dict[str, Any], folder: Path) -> Any:
    model = _trained(compose(build("vit"), {"lora": configs["lora"]}))
    model.add_adapter("other", configs["other"])
    return model


def _loaded_in_turns(configs: dict[str, Any], folder: Path) -> Any:
    _trained(compose(build("vit"), configs)).save_pretrained(folder)
    model: Any = build("vit")
    for name in configs:
        model = load_adapters(model, folder, selected_adapters=[name])
    return model


def _other_patches_for_one_save(configs: dict[str, Any], folder: Path) -> Any:
    model = _trained(compose(build("vit"), configs))
    patches = find_tower(model).part("patch_embedding").weight.detach()
    own = patches.clone()
    patches += torch.linspace(-1, 1, patches.numel()).reshape(patches.shape)
    model.save_pretrained(folder)
    patches.copy_(own)
    return model


@pytest.mark.filterwarnings("ignore:the base keeps the biases")
@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("kind", [RegisterConfig, PositionConfig])
@pytest.mark.parametrize("way", [_added_afterwards, _loaded_in_turns, _other_patches_for_one_save])
def test_biases_tell_of_the_base_again_once_nobody_brings_them(
    way: Callable[..., Any], kind: Any, bias: Any, tmp_path: Path
) -> None:
    """PEFT leaves trained biases in the base when their LoRA is deleted: no folder brings them."""
    lora = brought(LoraConfig(target_modules=["q_proj", "query"], bias=bias))
    model = way({"lora": lora, "other": kind()}, tmp_path / "before")
    model.delete_adapter("lora")
    expected = run(model.eval(), make_inputs("vit"))
    model.save_pretrained(tmp_path / "after")
    state = {key: value for key, value in model.get_base_model().state_dict().items() if key.endswith(".bias")}
    with pytest.raises(BaseModelMismatchError, match="they differ in weights"):
        load_adapters(build("vit"), tmp_path / "after")
    right = build("vit")
    assert not right.load_state_dict(state, strict=False).unexpected_keys
    assert_identical(run(load_adapters(right, tmp_path / "after").eval(), make_inputs("vit")), expected)


@pytest.mark.filterwarnings("ignore:the base keeps the biases")
def test_biases_that_a_deleted_lora_left_trainable_are_the_bases_beside_positions_too(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["q_proj", "query"], bias="all")
    model: Any = compose(build("vit"), {"lora": lora, "registers": RegisterConfig(), "positions": PositionConfig()})
    model.delete_adapter("lora")
    expected = run(_trained(model), make_inputs("vit"))
    model.save_pretrained(tmp_path)
    state = {key: value for key, value in model.get_base_model().state_dict().items() if key.endswith(".bias")}
    right = build("vit")
    assert not right.load_state_dict(state, strict=False).unexpected_keys
    assert_identical(run(load_adapters(right, tmp_path).eval(), make_inputs("vit")), expected)
    with pytest.raises(BaseModelMismatchError, match="they differ in weights"):
        load_adapters(build("vit"), tmp_path)
