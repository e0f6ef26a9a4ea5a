"""What LoRA, tuned norms or moved positions were trained with on a head model, used on the backbone."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import build, make_inputs
from helpers import Snapshot, assert_identical, run
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from register_adapter import (
    AdapterFileError,
    PositionConfig,
    RegisterConfig,
    add_registers,
    compose,
    load_adapters,
    save_adapters,
)
from register_adapter.tuner.composed import load_onto

HEAD: dict[str, Any] = {"modules_to_save": ["classifier"]}
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(target_modules=["q_proj", "query"], **HEAD),
    "whole": LoraConfig(target_modules=["q_proj", "query"], bias="all"),
    "whole_and_head": LoraConfig(target_modules=["q_proj", "query"], bias="all", **HEAD),
    "norms": LNTuningConfig(target_modules=["layernorm_before"], **HEAD),
    "positions": PositionConfig(**HEAD),
}


def head_model() -> Any:
    base = build("vit")
    model = tf.ViTForImageClassification(base.config)
    model.vit.load_state_dict(base.state_dict(), strict=False)
    return model.eval().requires_grad_(False)


def features(model: Any) -> torch.Tensor:
    return run(model.eval(), make_inputs("vit"), output_hidden_states=True)["hidden_states.2"]


def trained(kind: str, folder: Path, beside: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A folder with an adapter of that kind, which has the head, and what its model gives."""
    torch.manual_seed(1)
    configs = {kind: copy.deepcopy(CONFIGS[kind])} | ({"registers": RegisterConfig()} if beside else {})
    model = compose(head_model(), configs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapters(model, folder)
    return features(model), run(model.eval(), make_inputs("vit"))["logits"]


LEFT_OUT = "has 'classifier' trained beside its .*, and ViTModel has no module of that name"


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside registers"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_loads_on_the_backbone(kind: str, beside: bool, tmp_path: Path) -> None:
    expected, logits = trained(kind, tmp_path / "trained", beside)
    with pytest.warns(UserWarning, match=LEFT_OUT):
        model = load_adapters(build("vit"), tmp_path / "trained")
    assert torch.allclose(features(model), expected, atol=1e-6)
    save_adapters(model, tmp_path / "again")  # without the head
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*'classifier'.*trained beside.*")
        again = load_adapters(head_model(), tmp_path / "again")
    assert torch.allclose(features(again), expected, atol=1e-6)
    torch.manual_seed(1)  # where the head is the base's
    assert torch.equal(
        run(load_adapters(head_model(), tmp_path / "trained").eval(), make_inputs("vit"))["logits"], logits
    )


@pytest.mark.parametrize("owner", ["lora", "registers"])
def test_with_trained_biases_a_head_of_another_size_comes_too(owner: str, tmp_path: Path) -> None:
    """The bias of the base's own head is saved as well, by a name and in a size that are the old base's."""
    configs: dict[str, Any] = {
        "lora": LoraConfig(target_modules=["q_proj", "query"], bias="all", **(HEAD if owner == "lora" else {})),
        "registers": RegisterConfig(**(HEAD if owner == "registers" else {})),
    }
    model = compose(head_model(), configs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    save_adapters(model, tmp_path)
    base = head_model()
    base.classifier, base.config.num_labels = nn.Linear(32, 7), 7
    loaded = load_adapters(base, tmp_path)
    assert_identical(run(loaded.eval(), make_inputs("vit")), run(model.eval(), make_inputs("vit")))
    assert loaded.config.num_labels == 5


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_loaded_over_one_without_the_head(kind: str, tmp_path: Path) -> None:
    expected, _ = trained(kind, tmp_path, beside=True)
    plain = copy.deepcopy(CONFIGS[kind])
    plain.modules_to_save = None
    model = compose(build("vit"), {kind: plain, "registers": RegisterConfig()})
    with pytest.warns(UserWarning, match=LEFT_OUT):
        model.load_adapter(tmp_path, kind)
    assert torch.allclose(features(model), expected, atol=1e-6)


def test_moved_positions_alone_leave_the_head_out(tmp_path: Path) -> None:
    expected, _ = trained("positions", tmp_path, beside=False)
    with pytest.warns(UserWarning, match=LEFT_OUT):
        model = PeftModel.from_pretrained(build("vit"), tmp_path / "positions")
    assert torch.allclose(features(model), expected, atol=1e-6)


@pytest.mark.parametrize("modules", [["classifier"], None], ids=["head", "task alone"])
def test_moved_positions_with_a_task_load_on_the_backbone(modules: list[str] | None, tmp_path: Path) -> None:
    model = get_peft_model(head_model(), PositionConfig(task_type="SEQ_CLS", modules_to_save=modules))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=LEFT_OUT):
        loaded = PeftModel.from_pretrained(build("vit"), tmp_path)
    assert torch.allclose(features(loaded), features(model), atol=1e-6)


def test_a_head_that_is_refused_leaves_the_classes_of_the_config(tmp_path: Path) -> None:
    other, model = (add_registers(head_model(), 2, modules_to_save=["classifier"]) for _ in range(2))
    other.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.classifier.weight"] = torch.zeros(7, 32)  # and no bias of that size
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").unlink()
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    with pytest.raises((AdapterFileError, RuntimeError)):
        model.load_adapter(str(tmp_path), "default")
    assert model.peft_config["default"].to_dict() == before


def test_lora_alone_whose_tower_lies_elsewhere_is_refused_where_commands_load_it(tmp_path: Path) -> None:
    """PEFT reads nothing of it, with a warning: the base's figures would stand under the adapter's name."""
    trained("lora", tmp_path, beside=False)
    model = build("vit")
    before = Snapshot(model, make_inputs("vit"))
    with pytest.raises(
        AdapterFileError, match=r"it has no values for '.*lora_A\.weight' and \d+ more of ViTModel"
    ) as caught:
        load_onto(model, tmp_path / "lora")
    assert str(tmp_path / "lora") in str(caught.value)
    before.check()


def test_lora_alone_beside_a_head_of_no_parameters_says_what_it_leaves_out(tmp_path: Path) -> None:
    expected, _ = trained("lora", tmp_path, beside=False)
    base = head_model()
    base.classifier = nn.Identity()  # as timm's num_classes=0
    with pytest.warns(UserWarning, match="has 'classifier' trained beside its layers, and ViTForImageClassification"):
        model = load_onto(base, tmp_path / "lora")
    assert torch.allclose(features(model), expected, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=["plain", "lora_bias"])
@pytest.mark.parametrize(("name", "targets"), [("vit", ["q_proj", "projection"]), ("clip", ["q_proj"])])
def test_trained_biases_of_layers_outside_the_blocks_come_back(
    name: str, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    """LoRA's own layers, in the patch embedding or the text tower, keep the bias of what they are around inside."""
    torch.manual_seed(0)
    base = build(name)
    config = LoraConfig(target_modules=targets, bias="all", **options)
    model = compose(copy.deepcopy(base), {"lora": config, "registers": RegisterConfig()})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapters(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left out.*")
        loaded = load_adapters(copy.deepcopy(base), tmp_path)
    expected = {key: value for key, value in model.state_dict().items() if key.endswith(".bias")}
    assert_identical({key: value for key, value in loaded.state_dict().items() if key in expected}, expected)
