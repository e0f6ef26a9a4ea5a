"""Files and folders that would take memory, hang or loop: refused by what their headers, links and kinds say."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import assert_identical, run
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from register_adapter import (
    AdapterFileError,
    RegisterConfig,
    RegisterPeftModel,
    add_registers,
    compose,
    load_adapters,
    save_adapters,
)
from register_adapter.data.folders import read_flat_folder, read_image_folder
from register_adapter.utils.files import check_regular, checksum


def save(folder: Path, value: float) -> Path:
    model = add_registers(build("vit"), 2)
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {key: torch.full_like(tensor, value) for key, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["weights_sha256"] = checksum(weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("way", ["peft", "transformers"])
@pytest.mark.parametrize("value", [3e38, -1e20])
def test_values_that_overflow_are_refused(value: float, way: str, tmp_path: Path) -> None:
    base, inputs = build("vit"), make_inputs("vit")
    before = run(base, inputs)
    folder = str(save(tmp_path, value))
    load = base.load_adapter if way == "transformers" else partial(RegisterPeftModel.from_pretrained, base)
    with pytest.raises(AdapterFileError, match="whose squares are infinite in float32"):
        load(folder)
    assert_identical(run(base, inputs), before)


def test_values_beyond_the_dtype_of_the_model_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1e6)
    RegisterPeftModel.from_pretrained(build("vit").bfloat16(), folder)
    with pytest.raises(AdapterFileError, match=r"the model is in torch\.float16, which ends at 6\.55e\+04"):
        RegisterPeftModel.from_pretrained(build("vit").half(), folder)


@pytest.mark.parametrize("changes", [{"rank_pattern": {"fc1": 10**9}}, {"rank_pattern": {"x": 10**9}}, {"r": 10**9}])
def test_a_rank_that_the_tensors_do_not_have_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    base = build("dinov2")
    save_adapters(compose(base, {"lora": LoraConfig(r=4, target_modules=["fc1"])}), tmp_path)
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    manifest = json.loads((tmp_path / "adapters.json").read_text())
    manifest["adapters"][0]["config_sha256"] = checksum(path)
    (tmp_path / "adapters.json").write_text(json.dumps(manifest))
    fresh = build("dinov2")
    before = run(fresh, make_inputs("dinov2"))
    with pytest.raises(AdapterFileError, match=f"{next(iter(changes))}=1000000000"):
        load_adapters(fresh, tmp_path)
    assert_identical(run(fresh, make_inputs("dinov2")), before)


def test_a_pipe_in_the_place_of_a_base_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", 1.0)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "base").mkdir()
    os.mkfifo(tmp_path / "base" / "config.json")
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in ("pipe", "base"):
        config["base_model_name_or_path"] = str(tmp_path / name)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(AdapterFileError, match="not a regular file but a pipe"):
            RegisterConfig.from_pretrained(str(folder))
        with pytest.raises(OSError, match="not a regular file but a pipe"):
            check_regular(tmp_path / name)


@pytest.mark.parametrize("target", ["..", ".", "../..", "/"])
def test_a_link_to_a_folder_above_is_not_followed(target: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("cat", "dog"):
        (root / name / "more").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "more" / "1.png")
    expected = {label: [str(root / name / "more" / "1.png")] for label, name in enumerate(("cat", "dog"))}
    (root / "cat" / "up").symlink_to(target)
    (root / "dog" / "more" / "up").symlink_to(root)
    (root / "all").symlink_to(root)
    data = read_image_folder(root)
    assert data.features["label"].names == ["cat", "dog"]
    assert {label: [row["image"]["path"] for row in data if row["label"] == label] for label in (0, 1)} == expected
    assert len(read_flat_folder(root)) == 2


def test_a_link_to_another_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "disk" / "1.png")
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / "more").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "disk")
    assert read_image_folder(tmp_path / "data")["label"] == [0, 1]
