"""``register-adapter fit`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import call, run_here
from peft import AutoPeftModel, PeftModel

from register_adapter import find_register_layer
from register_adapter.artifacts import patch_norms
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted ViT on disk, and a folder of images with a file among them that is not one."""
    folder = tmp_path_factory.mktemp("fit")
    load_planted_vit().model.save_pretrained(folder / "model")
    load_image_processor().save_pretrained(folder / "model")
    SceneDataset(40, seed=4, split=None).write(folder / "images")
    (folder / "images" / "notes.txt").write_text("not an image")
    return folder


@pytest.mark.parametrize("options", [(), ("--attention_bias", "--remove", "mean"), ("--num_neurons", "2")], ids=str)
def test_on_a_model_and_images_of_ones_own(
    options: tuple[str, ...],
    folder: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "fitted"
    given = ("fit", str(folder / "model"), str(folder / "images"), "--out", str(out), *options)
    said = run_here(*given)
    assert "notes.txt" in said, "the bad file is named"
    assert "hidden units" in said
    assert "images: what the registers were fitted to, without training" in (out / "README.md").read_text("utf-8")
    planting = load_planted_vit()
    model = AutoPeftModel.from_pretrained(out).eval()
    neurons = find_register_layer(model).tokens("default").neurons()
    assert set(neurons) == {planting.block}
    if "--num_neurons" in options:
        assert len(neurons[planting.block]) == 2
        return
    assert sorted(neurons[planting.block]) == list(planting.neurons)
    scenes = SceneDataset(16, seed=77, split="test")
    pixels = load_image_processor()(images=[scenes.scene(index).pil for index in range(16)], return_tensors="pt")
    before, after = (patch_norms(looked_at, [pixels["pixel_values"]]) for looked_at in (planting.model, model))
    assert (before > 3 * before.median()).any()
    assert not (after > 3 * after.median()).any()
    assert json.loads((out / "adapter_config.json").read_text())["test_time_fit"]["share_after"] == 0
    again = PeftModel.from_pretrained(load_planted_vit().model, out).eval()
    with torch.no_grad():
        assert torch.equal(again(**pixels).logits, model(**pixels).logits)


@pytest.mark.parametrize(
    ("out", "file", "message"),
    [
        ("{model}/.", "config.json", "is what the run reads"),
        ("{images}", "notes.txt", "is what the run reads"),
        ("{tmp}/other", "config.json", "holds a model (config.json)"),
        ("{tmp}/trained", "results.json", "holds a training run (results.json)"),
        ("{tmp}/several", "adapters.json", "holds a training run (adapters.json)"),
    ],
)
def test_a_fit_replaces_no_model_and_nothing_trained(
    out: str, file: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(out.format(model=folder / "model", images=folder / "images", tmp=tmp_path))
    if tmp_path in place.parents:
        place.mkdir()
        (place / file).write_text("{}")
    before = sorted(place.iterdir())
    said = str(call(monkeypatch, "fit", str(folder / "model"), str(folder / "images"), "--out", str(place)))
    assert said.startswith("error: ")
    assert message in said
    assert sorted(place.iterdir()) == before


def test_a_clean_model_is_left_alone(tmp_path: Path) -> None:
    said = run_here("fit", "clean", "scenes", "--out", str(tmp_path / "out"), "--max_images", "48")
    assert "needs no registers" in said
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_end_in_one_clear_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "give --top-block": ("--threshold", "3"),
        "block of the model": ("--top-block", "99"),
        "unknown rule": ("--rule", "none"),
        "image is bad, and none may be": ("--strict",),
    }
    for message, options in cases.items():
        given = ("fit", str(folder / "model"), str(folder / "images"), "--out", str(tmp_path / "x"), *options)
        said = str(call(monkeypatch, *given))
        assert said.startswith("error: ")
        assert message in said
