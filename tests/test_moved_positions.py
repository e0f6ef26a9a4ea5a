"""Position embeddings that move: in every family the model starts as it was, and what is trained comes back."""

from __future__ import annotations

import copy
import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CASES, build, make_inputs
from helpers import run
from peft import LoraConfig, PeftModel, get_peft_model
from stacks_cases import build_stack, images
from test_replicas import in_a_thread, replicate
from torch import nn

from register_adapter import (
    BaseModelMismatchError,
    PositionConfig,
    RegisterConfig,
    UnsupportedModelError,
    compose,
    load_adapters,
    save_adapters,
)
from register_adapter.errors import AdapterFileError
from register_adapter.features.layout import tower_of
from register_adapter.features.prefix import check_prefix
from register_adapter.training.moving import Moving, put_on
from register_adapter.training.setup import parameter_groups
from register_adapter.tuner.positions import position_layers

#: Parameters of embedding layers, an ``nn.Embedding``, a tower's own, and an absolute one beside relative ones.
FAMILIES = ["vit", "deit", "dinov2", "clip-vision", "siglip-vision", "beit", "aimv2-vision", "idefics3-vision"]
STACKS = ["timm", "eva", "open_clip", "torchvision", "hub"]


def fresh(name: str) -> nn.Module:
    model: nn.Module = build_stack(name) if name in STACKS else build(name)
    return model


def outputs(name: str, model: Any) -> torch.Tensor:
    if name in STACKS:
        with torch.no_grad():
            result = model(images())
        return result[0] if isinstance(result, tuple) else result
    return run(model, make_inputs(name))["last_hidden_state"]


def move(model: nn.Module) -> None:
    """As if trained."""
    generator = torch.Generator().manual_seed(3)
    for layer in position_layers(model):
        for offsets in layer.offset_positions_values.values():
            offsets.weight.data.normal_(generator=generator)


def moved(name: str, **options: Any) -> Any:
    model = get_peft_model(fresh(name), PositionConfig(**options))
    move(model)
    return model


@pytest.mark.parametrize("name", [*FAMILIES, *STACKS])
def test_they_start_as_the_base_move_come_back_and_merge(name: str, tmp_path: Path) -> None:
    base = fresh(name)
    keys, kinds, plain = list(base.state_dict()), [type(part) for part in base.modules()], outputs(name, base)
    model = compose(base, {"positions": PositionConfig(), "registers": RegisterConfig(num_registers=2)})
    with model.disable_adapter("registers"):
        assert torch.equal(outputs(name, model), plain)
    move(model)
    trained = outputs(name, model)
    with model.disable_adapter("registers"):
        without_registers = outputs(name, model)
    assert not torch.allclose(without_registers, plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(outputs(name, model), plain)

    save_adapters(model, tmp_path)
    again = load_adapters(fresh(name), tmp_path)
    assert torch.equal(outputs(name, again), trained)
    alone = PeftModel.from_pretrained(fresh(name), str(tmp_path / "positions"))
    merged = alone.merge_and_unload(safe_merge=True)
    assert torch.equal(outputs(name, merged), without_registers)
    left = again.merge_and_unload()
    assert torch.equal(outputs(name, left), trained), "registers stay where positions are merged"
    for unloaded, result in ((model.unload(), plain), (merged, without_registers)):
        assert torch.equal(outputs(name, unloaded), result)
        assert (list(unloaded.state_dict()), [type(part) for part in unloaded.modules()]) == (keys, kinds)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov3", "DINOv3ViTModel .* has no learned position embeddings that could move"),
        ("mlcd-vision", "MLCDVision.* has no learned position embeddings"),
        ("videomae", "VideoMAEModel .* are fixed or quantised"),
    ],
)
def test_a_family_without_them_is_refused_by_name(name: str, message: str) -> None:
    base = fresh(name)
    before = outputs(name, base)
    with pytest.raises(UnsupportedModelError, match=message):
        put_on(base, Moving.parse("registers+positions"), {"num_registers": 1})
    assert torch.equal(outputs(name, base), before)
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip-vision", "timm-dynamic", "hub"])
def test_at_another_size_they_are_interpolated_with_the_others(name: str) -> None:
    stack = name in ("timm-dynamic", "hub")
    model = get_peft_model(build_stack(name) if stack else build(name), PositionConfig())
    move(model)

    def wide() -> torch.Tensor:
        with torch.no_grad():
            if stack:
                return torch.as_tensor(model(images(48)))
            result = model(
                **make_inputs(name, size=48), **({} if name == "dinov2" else {"interpolate_pos_encoding": True})
            )
        return torch.as_tensor(result.last_hidden_state)

    trained = wide()
    with model.disable_adapter():
        assert not torch.allclose(wide(), trained, atol=1e-3)
    model.merge_adapter()
    assert torch.equal(wide(), trained)
    layer = position_layers(model)[0]
    frozen = layer.base.detach().clone()
    model.unmerge_adapter()
    assert not torch.equal(layer.base, frozen)
    assert torch.equal(wide(), trained)


def test_a_base_with_another_grid_is_refused(tmp_path: Path) -> None:
    save_adapters(compose(fresh("vit"), {"positions": PositionConfig()}), tmp_path)
    other: Any = fresh("vit")
    other.embeddings.position_embeddings = nn.Parameter(torch.zeros(1, 26, 32))
    with pytest.raises(AdapterFileError, match=r"26, 32"):
        load_adapters(other, tmp_path)
    assert not position_layers(other)


def test_other_bases_are_refused(tmp_path: Path) -> None:
    model = compose(fresh("vit"), {"positions": PositionConfig()})
    save_adapters(model, tmp_path)
    other: Any = fresh("vit")
    other.embeddings.patch_embeddings.projection.weight.data.normal_()
    with pytest.raises(BaseModelMismatchError, match="differ in weights"):
        load_adapters(other, tmp_path)
    assert [type(part) for part in other.modules()] == [type(part) for part in fresh("vit").modules()]
    alone = str(tmp_path / "positions")
    with pytest.raises(BaseModelMismatchError, match="If you know that it fits"):
        PeftModel.from_pretrained(other, alone)
    for load, folder in ((load_adapters, str(tmp_path)), (PeftModel.from_pretrained, alone)):
        loaded = load(other, folder, ignore_base_mismatch=True)
        assert position_layers(loaded)
        loaded.unload()


def test_weights_that_come_after_the_offsets_are_the_base(tmp_path: Path) -> None:
    base: Any = fresh("vit")
    for number, model in enumerate((compose(base, {"positions": PositionConfig()}), moved("vit"))):
        inner: Any = model.get_base_model()
        inner.embeddings.patch_embeddings.projection.weight.data.normal_()
        model.save_pretrained(str(tmp_path / str(number)))
        weights = {key: value for key, value in inner.state_dict().items() if "offset_positions" not in key}
        other = fresh("vit")
        other.load_state_dict(weights)
        load = load_adapters if number == 0 else PeftModel.from_pretrained
        assert torch.equal(outputs("vit", load(other, str(tmp_path / str(number)))), outputs("vit", model))


@pytest.mark.parametrize("under_a_head", [False, True])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_the_tower_may_lie_elsewhere(under_a_head: bool, whole_folder: bool, tmp_path: Path) -> None:
    source, target = build("vit-classifier"), build("vit-classifier")
    source, target = (source.vit, target) if under_a_head else (source, target.vit)
    model = compose(source, {"positions": PositionConfig()})
    move(model)
    save_adapters(model, tmp_path)
    load, folder = (load_adapters, tmp_path) if whole_folder else (PeftModel.from_pretrained, tmp_path / "positions")
    loaded = load(target, str(folder))
    assert torch.equal(
        position_layers(loaded)[0](torch.zeros(1, 17, 32)), position_layers(model)[0](torch.zeros(1, 17, 32))
    )


def test_a_refusal_leaves_no_class_behind() -> None:
    base = fresh("vit")
    kinds, keys = [type(part) for part in base.modules()], list(base.state_dict())
    with pytest.raises(ValueError, match=r"no_such_layer|No modules were targeted|not found"):
        compose(base, {"positions": PositionConfig(), "lora": LoraConfig(target_modules=["no_such_layer"])})
    assert ([type(part) for part in base.modules()], list(base.state_dict())) == (kinds, keys)


@pytest.mark.parametrize("first", ["positions", "lora"])
def test_another_adapter_of_the_same_embedding_is_refused(first: str) -> None:
    configs = {"positions": PositionConfig(), "lora": LoraConfig(target_modules=["position_embedding"])}
    base = fresh("clip-vision")
    with pytest.raises((ValueError, UnsupportedModelError), match="wrap"):
        compose(base, {name: configs[name] for name in sorted(configs, key=lambda name: name != first)})
    assert not position_layers(base)


@pytest.mark.parametrize("name", ["vit", "clip-vision", "timm"])
def test_copies_pickles_and_replicas_are_models_of_their_own(name: str) -> None:
    model = moved(name)
    trained = outputs(name, model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = (copy.deepcopy(model), torch.load(stored, weights_only=False))
    replica = replicate(model)
    assert torch.equal(in_a_thread(lambda: outputs(name, replica)), trained)
    for copied in copies:
        assert torch.equal(outputs(name, copied), trained)
        copied.unload()
        assert torch.equal(outputs(name, model), trained)


def test_threads_and_checkpointing_give_the_same_gradients() -> None:
    model = compose(fresh("vit"), {"positions": PositionConfig(), "registers": RegisterConfig(num_registers=2)}).train()
    inputs = make_inputs("vit")
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2

    def gradients() -> list[torch.Tensor]:
        loss = model(**inputs).last_hidden_state.square().sum()
        return list(torch.autograd.grad(loss, list(trained.values())))

    alone, together = gradients(), []
    threads = [threading.Thread(target=lambda: together.extend(gradients())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for reentrant in (False, True):
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        together += gradients() if not reentrant else _accumulated(model, inputs, trained)
    for index, gradient in enumerate(together):
        torch.testing.assert_close(gradient, alone[index % 2])
    assert len(together) == 8


def _accumulated(model: Any, inputs: Any, trained: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    """By ``backward``, which reentrant checkpoints need."""
    model(**inputs).last_hidden_state.square().sum().backward()
    return [value.grad for value in trained.values() if value.grad is not None]


def test_half_precision_starts_as_the_base_and_trains_in_float32() -> None:
    base = build("dinov2", dtype=torch.bfloat16)
    inputs = make_inputs("dinov2", dtype=torch.bfloat16)
    plain = run(base, inputs)["last_hidden_state"]
    model = get_peft_model(base, PositionConfig())
    assert torch.equal(run(model, inputs)["last_hidden_state"], plain)
    (weight,) = (value for value in model.parameters() if value.requires_grad)
    assert weight.dtype == torch.float32


@pytest.mark.skipif("molmo2-vision" not in CASES, reason="transformers 4 has no Molmo2")
def test_the_base_under_them_says_who_it_is(tmp_path: Path) -> None:
    # Position embeddings decide where a tower has neither patch embedding nor biases that tell it.
    model = put_on(fresh("molmo2-vision"), Moving.parse("registers+positions"), {"num_registers": 1})
    move(model)
    save_adapters(model, tmp_path)
    again = load_adapters(fresh("molmo2-vision"), tmp_path)
    pair = [loaded.peft_config["registers"].base_tower for loaded in (model, again)]
    assert pair[0] == pair[1]


def test_no_prefix_is_kept_and_no_decay_pulls_at_them() -> None:
    model = put_on(fresh("vit"), Moving.parse("registers+positions"), {"num_registers": 1, "insert_layer": 1})
    tower, layer = tower_of(model)
    with pytest.raises(ValueError, match=r"offset_positions.* is trained and comes before block 1"):
        check_prefix(tower, layer, 1)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert [group["weight_decay"] for group in parameter_groups(trained, 0.1)] == [0.0]


def test_two_of_them_add_up_and_leave_one_by_one() -> None:
    model = compose(fresh("vit"), {"first": PositionConfig(), "second": PositionConfig()})
    move(model)
    both = outputs("vit", model)
    model.set_adapter("second")
    second = outputs("vit", model)
    assert not torch.equal(second, both)
    model.delete_adapter("first")
    assert torch.equal(outputs("vit", model), second)
    model.delete_adapter("second")
    assert torch.equal(outputs("vit", model), outputs("vit", fresh("vit")))
    assert not position_layers(model)


def test_without_compose_they_are_taken_off_and_put_on_again() -> None:
    plain, base = outputs("vit", fresh("vit")), fresh("vit")
    base.add_adapter(PositionConfig(), "positions")  # type: ignore[operator]
    move(base)
    assert not torch.equal(outputs("vit", base), plain)
    base.delete_adapter("positions")  # type: ignore[operator]
    assert torch.equal(outputs("vit", base), plain)
    base.add_adapter(PositionConfig(), "others")  # type: ignore[operator]
    assert torch.equal(outputs("vit", base), plain)
    move(base)
    assert not torch.equal(outputs("vit", base), plain)


@pytest.mark.parametrize("adding", [True, False])
def test_whoever_walks_over_a_model_is_not_disturbed(adding: bool) -> None:
    """By offsets that another thread adds or deletes at any step of it."""
    model = get_peft_model(fresh("vit"), PositionConfig())
    if not adding:
        model.add_adapter("guest", PositionConfig())
    (layer,) = position_layers(model)
    own, before, seen = layer.offset_positions_values["default"], list(model.modules()), []
    for module in model.modules():
        seen.append(module)
        if module is own and adding:
            model.add_adapter("guest", PositionConfig())
        elif module is own:
            model.delete_adapter("guest")
    assert seen == before
    assert ("guest" in layer.offset_positions_values) == adding


@pytest.mark.parametrize("holder", ["PEFT", "transformers"])
def test_offsets_beside_a_lora_without_compose_are_saved_alone(holder: str, tmp_path: Path) -> None:
    lora, model = LoraConfig(target_modules=["q_proj", "query"]), build("vit")
    if holder == "PEFT":
        model = get_peft_model(get_peft_model(model, lora, "lora"), PositionConfig(), "offsets")
    else:
        model.add_adapter(lora, "lora")
        model.add_adapter(PositionConfig(), "offsets")
        model.set_adapter("offsets")
    (values,) = (value for key, value in model.named_parameters() if key.endswith("positions_values.offsets.weight"))
    torch.nn.init.normal_(values)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("vit"), tmp_path / ("offsets" if holder == "PEFT" else ""))
    (given,) = (value for key, value in loaded.named_parameters() if "positions_values" in key)
    assert torch.equal(given, values)
