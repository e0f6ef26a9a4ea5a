"""The shipped models have names that lead to them anywhere, also from an adapter's folder in another process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from processes import run_script

from register_adapter import BaseModelMismatchError, RegisterConfig, add_registers, audit
from register_adapter.commands.runs.fit import FitArguments, run_fit
from register_adapter.commands.runs.inputs import load_base, load_processor
from register_adapter.data import load_image_processor
from register_adapter.testbed import SceneDataset, load_planted_vit, load_shipped, load_vit
from register_adapter.utils.shipped import PLANTED, SHIPPED, local_folder, shipped_model

PIXELS = torch.rand(2, 3, 80, 80, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_name_leads_to_the_model(name: str) -> None:
    expected = shipped_model(name)
    assert expected.config._name_or_path == expected.name_or_path == name
    written = type(expected).from_pretrained(local_folder(name)).eval()
    pixels = PIXELS[..., : expected.config.image_size, : expected.config.image_size]
    for model in (load_shipped(name), load_base(name), written):
        with torch.no_grad():
            assert torch.equal(model(pixels)[0], expected(pixels)[0])
    assert load_processor(name).to_dict() == load_image_processor(name).to_dict()


def test_an_unknown_name_says_which_there_are(tmp_path: Path) -> None:
    for call in (load_shipped, local_folder):
        with pytest.raises(ValueError, match="is not shipped with register-adapter; it has register-adapter://clean, "):
            call("register-adapter://other")
    with pytest.raises(ValueError, match="is not shipped"):
        RegisterConfig(base_model_name_or_path="register-adapter://other")


@pytest.mark.slow
def test_what_fit_writes_loads_without_a_base_at_hand(tmp_path: Path) -> None:
    out = tmp_path / "fitted"
    run_fit(FitArguments("planted", "scenes", str(out), max_images=24))
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == PLANTED
    expected = PeftModel.from_pretrained(load_planted_vit().model, str(out)).eval()
    run_script("load_shipped_fit", tmp_path, cwd=tmp_path)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), expected(PIXELS).logits)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["base_model_name_or_path"] == PLANTED


def test_the_other_base_is_named_before_the_override(tmp_path: Path) -> None:
    add_registers(load_planted_vit().model).save_pretrained(tmp_path)
    with pytest.raises(BaseModelMismatchError) as caught:
        PeftModel.from_pretrained(load_vit(), str(tmp_path))
    text = str(caught.value)
    assert text.index("load_shipped('register-adapter://planted')") < text.index("ignore_base_mismatch=True")


def test_images_are_prepared_for_a_shipped_model() -> None:
    report = audit(load_vit(), SceneDataset(4, seed=1, split="test"))
    assert report.layers


def test_registers_of_a_shipped_model_come_back(tmp_path: Path) -> None:
    model = add_registers(load_vit(), init_std=1.0).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModel.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(PIXELS).logits, model(PIXELS).logits)
