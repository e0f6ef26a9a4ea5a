"""Bases and processors that are damaged, or not of one model: one line that names their folder, before any work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    CLIPImageProcessor,
    Pix2StructImageProcessor,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from register_adapter import add_registers
from register_adapter.data.batches import ImageBatches
from register_adapter.data.processing import check_fits, process_image
from register_adapter.errors import UnsupportedModelError
from register_adapter.studies import study
from register_adapter.towers import find_tower
from register_adapter.training.launch import main as train_main

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vit"
    ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for index in range(3):
            Image.new("RGB", (20, 20), (index, len(name), 90)).save(folder / name / f"{index}.png")
    return folder


def set_in_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    return change


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def cut(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut weights": cut,
    "empty weights": write("model.safetensors", ""),
    "another activation": set_in_config(hidden_act="none_of_them"),
    "a width that is text": set_in_config(hidden_size="wide"),
    "a width beyond memory": set_in_config(hidden_size=2**40),
    "a processor that is a list": write("preprocessor_config.json", "[1]"),
    "a size that is text": write(
        "preprocessor_config.json", '{"image_processor_type": "ViTImageProcessor", "size": "x"}'
    ),
}


CASES = [(damage, command) for damage in DAMAGE for command in ("audit", "train")]
#: It copies the processor's file, and does not read it.
CASES += [(damage, "export") for damage in DAMAGE if "weights" in damage or "width" in damage]


@pytest.mark.parametrize(("damage", "command"), CASES)
def test_a_damaged_model_is_named_in_one_line(
    damage: str,
    command: str,
    vit: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(vit, folder)
    add_registers(ViTModel.from_pretrained(folder), 2).save_pretrained(tmp_path / "adapter")
    DAMAGE[damage](folder)
    words: dict[str, tuple[Any, ...]] = {
        "audit": (folder, images, "--out", out, "--quiet"),
        "export": (tmp_path / "adapter", "--out", out, "--format", "program", "--quiet"),
        "train": ("--model-name-or-path", folder, "--train-dir", images, "--output-dir", out, "--use-cpu", "--quiet"),
    }
    said = call(monkeypatch, command, *map(str, words[command]))
    said = said if isinstance(said, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert f"'{folder}' cannot be loaded" in said
    assert said.lower().startswith("error: ")
    assert "\n" not in said
    assert not (out / "adapter_config.json").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
@pytest.mark.parametrize("command", ["audit", "train"])
def test_a_file_that_may_not_be_read_is_said_to_be_that(
    command: str,
    name: str,
    vit: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(vit, folder)
    closed = str(folder / name)

    def weights(*args: Any, **kwargs: Any) -> None:  # root may read every file; this is what safetensors says of one
        raise FileNotFoundError(f"No such file or directory: {closed}")

    def processor(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", closed)

    asked = os.access
    monkeypatch.setattr(
        os, "access", lambda path, *args, **kwargs: str(path) != closed and asked(path, *args, **kwargs)
    )
    monkeypatch.setattr(
        *(
            (ViTModel, "from_pretrained", weights)
            if "model" in name
            else (AutoImageProcessor, "from_pretrained", processor)
        )
    )
    words: dict[str, tuple[Any, ...]] = {
        "audit": (folder, images, "--out", out, "--quiet"),
        "train": ("--model-name-or-path", folder, "--train-dir", images, "--output-dir", out, "--use-cpu", "--quiet"),
    }
    words["train"] += ("--objective", "distillation")
    said = call(monkeypatch, command, *map(str, words[command]))
    said = said if isinstance(said, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert said.partition(": ")[2] == f"[Errno 13] Permission denied: '{closed}'"


@pytest.mark.parametrize("name", ["Trainer", "ViTConfig", "pipeline", 3])
def test_a_config_that_names_no_model_class_loads_the_plain_model(
    name: Any, vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(vit, tmp_path / "model")
    set_in_config(architectures=[name])(tmp_path / "model")
    try:
        AutoConfig.from_pretrained(tmp_path / "model")
    except Exception:
        pytest.skip("these versions of transformers and the hub read no such config")
    assert call(monkeypatch, "audit", str(tmp_path / "model"), str(images), "--out", str(tmp_path), "--quiet") == 0


def test_a_tower_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no vision tower|blocks"):
        find_tower(ViTModel(ViTConfig(**{**SIZES, "num_hidden_layers": 0}, image_size=16, patch_size=8)))


PROCESSORS = {
    "flattened patches": (Pix2StructImageProcessor(), {}, "it makes flattened_patches"),
    "less than a patch": (ViTImageProcessor(size={"height": 4, "width": 4}), {}, "the 8 × 8 of a patch"),
    "colours for a grey model": (
        ViTImageProcessor(size={"height": 16, "width": 16}),
        {"num_channels": 1},
        "1 channels",
    ),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_a_processor_of_another_model_is_refused(case: str, images: Path, tmp_path: Path) -> None:
    processor, options, message = PROCESSORS[case]
    model = ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8, **options))
    batches = ImageBatches(images, processor)
    with pytest.raises(ValueError, match=f"not the image processor of this ViTModel: .*{message}"):
        next(batches.on(model.device, model.dtype, model))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    words = ["--model-name-or-path", tmp_path, "--train-dir", images, "--output-dir", tmp_path / "out", "--use-cpu"]
    with pytest.raises(SystemExit) as stop:
        train_main([*map(str, words), "--quiet"])
    assert stop.value.code == 1


def test_a_processor_of_another_family_that_fits_is_taken() -> None:
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    made = process_image(processor, Image.new("RGB", (20, 30)), "image")
    check_fits(made, ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8)), processor)


def test_rows_of_patches_are_not_trained_on(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    model = Siglip2VisionModel(Siglip2VisionConfig(**SIZES, patch_size=8, num_patches=16))
    with pytest.raises(UnsupportedModelError, match="rows of patches"):
        study(model, images, tmp_path / "study", image_processor=processor)
    assert not (tmp_path / "study").exists()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    words = ["--model-name-or-path", tmp_path, "--train-dir", images, "--output-dir", tmp_path / "out", "--use-cpu"]
    with pytest.raises(SystemExit) as stop:
        train_main([*map(str, words), "--objective", "preserve", "--quiet"])
    assert stop.value.code == 1
    known = "siglip2_vision_model" in CONFIG_MAPPING  # as a tower alone, older transformers does not load it
    assert ("rows of patches" if known else "does not recognize this architecture") in capsys.readouterr().err
