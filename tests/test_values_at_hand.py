"""What a save needs is fetched where accelerate has put it, and refused where it is no longer a parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from families import build, make_inputs
from helpers import assert_identical, run
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm

from register_adapter import PositionConfig, RegisterConfig, add_registers, compose, find_register_layer, load_adapters
from register_adapter.utils.adapter_file import read_tensors

NAME = "vit-classifier"
Offload = Callable[[Any, Path], Any]
OFFLOADS: dict[str, Offload] = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder / "disk")),
}


@pytest.mark.parametrize("where", OFFLOADS)
@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["classifier"]}, {"key_value": True, "gate": -1.0}],
    ids=["head", "key_value"],
)
def test_offloaded_registers_are_saved(where: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = add_registers(build(NAME), init_std=1.0, **options).eval()
    expected = run(model, make_inputs(NAME))
    offloaded = OFFLOADS[where](model, tmp_path)
    offloaded.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(build(NAME), tmp_path / "out").eval()
    assert_identical(run(loaded, make_inputs(NAME)), expected)
    if not options.get("modules_to_save"):  # of PEFT's own class, which leaves a head to PEFT
        accelerate.cpu_offload(loaded).save_pretrained(tmp_path / "again")
        loaded = PeftModel.from_pretrained(build(NAME), tmp_path / "again").eval()
        assert_identical(run(loaded, make_inputs(NAME)), expected)
    assert_identical(run(offloaded, make_inputs(NAME)), expected)


def test_offloaded_adapters_of_several_methods_are_saved(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)
    model = compose(build(NAME), {"registers": RegisterConfig(), "lora": lora}).eval()
    expected = run(model, make_inputs(NAME))
    accelerate.cpu_offload(model).save_pretrained(tmp_path)
    assert_identical(run(load_adapters(build(NAME), tmp_path).eval(), make_inputs(NAME)), expected)


@pytest.mark.parametrize("where", OFFLOADS)
def test_offloaded_offsets_of_positions_take_part(where: str, tmp_path: Path) -> None:
    model = get_peft_model(build(NAME), PositionConfig())
    torch.manual_seed(0)
    for value in (value for value in model.parameters() if value.requires_grad):
        torch.nn.init.normal_(value)
    expected = run(model.eval(), make_inputs(NAME))
    assert_identical(run(OFFLOADS[where](model, tmp_path), make_inputs(NAME)), expected)


class Doubled(nn.Module):
    def forward(self, weight: Any) -> Any:
        return 2 * weight


MADE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "parametrized": (
        lambda tokens: parametrize.register_parametrization(tokens, "weight", Doubled()),
        lambda tokens: parametrize.remove_parametrizations(tokens, "weight"),
    ),
    "pruned": (
        lambda tokens: prune.l1_unstructured(tokens, "weight", 0.5),
        lambda tokens: prune.remove(tokens, "weight"),
    ),
    "normed": (weight_norm, remove_weight_norm),
    "normed by its spectrum": (spectral_norm, remove_spectral_norm),
}


@pytest.mark.parametrize("together", [False, True], ids=["alone", "composed"])
@pytest.mark.parametrize("how", MADE)
def test_registers_that_are_computed_are_not_saved(how: str, together: bool, tmp_path: Path) -> None:
    make, plain = MADE[how]
    base = build("vit")
    model: Any = compose(base, {"default": RegisterConfig()}) if together else add_registers(base)
    model.eval().save_pretrained(tmp_path)
    saved = tmp_path / "default" if together else tmp_path
    before = read_tensors(saved / "adapter_model.safetensors")
    make(find_register_layer(model).tokens("default"))
    with pytest.raises(ValueError, match="not saved, since its registers are computed from other tensors"):
        model.save_pretrained(tmp_path)
    assert_identical(read_tensors(saved / "adapter_model.safetensors"), before)
    expected = run(model, make_inputs("vit"))
    plain(find_register_layer(model).tokens("default"))
    model.save_pretrained(tmp_path)
    loaded = load_adapters(build("vit"), tmp_path) if together else PeftModel.from_pretrained(build("vit"), tmp_path)
    assert_identical(run(loaded.eval(), make_inputs("vit")), expected)
