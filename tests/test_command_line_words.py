"""What a command says where something is missing, out of range or stopped: one line, before any work."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import call
from peft import LoraConfig
from PIL import Image

from register_adapter import add_registers, compose, save_adapters
from register_adapter.commands import cli
from register_adapter.training import TrainArguments
from register_adapter.training.launch import _messages


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images/`` with one image, ``adapter/`` whose base is gone, ``several/`` with LoRA beside registers."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "images" / "cat").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "images" / "cat" / "1.png")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    model = add_registers(transformers.ViTModel(config), num_registers=1)
    model.save_pretrained(folder / "adapter")
    place = folder / "adapter" / "adapter_config.json"
    values = json.loads(place.read_text("utf-8")) | {"base_model_name_or_path": "/gone/base"}
    place.write_text(json.dumps(values), "utf-8")
    save_adapters(compose(model, {"lora": LoraConfig(target_modules=["query", "q_proj"], r=1)}), folder / "several")
    return folder


MISTAKES = {
    "an export whose base is gone": (("export", "{given}/adapter", "--out", "{out}"), "/given", "--base"),
    "an export of several": (("export", "{given}/several", "--out", "{out}"), "/several", "load_adapters"),
    "an adapter for a model": (("audit", "{given}/adapter", "scenes", "--out", "{out}"), "/adapter", "an adapter"),
    "several for a model": (("features", "{given}/several", "scenes", "--out", "{out}/f.parquet"), "an adapter"),
    "a file for a model": (("audit", "{given}/images/cat/1.png", "scenes", "--out", "{out}"), "1.png", "is a file"),
    "a kind of features": (("eval", "knn", "planted", "scenes", "--feature", "x"), "one of auto, cls"),
    "one image to draw from": (("eval", "knn", "planted", "{given}/images"), "/images has 1 image,", "two sets"),
    "a format that parquet lacks": (
        ("features", "planted", "scenes", "--dtype", "bfloat16", "--out", "{out}/f.parquet"),
        "--dtype 'float16'",
    ),
    "an unknown format": (("features", "planted", "scenes", "--dtype", "x", "--out", "{out}/f.parquet"), "--dtype 'x'"),
    "what a fit removes": (("fit", "planted", "scenes", "--remove", "x", "--out", "{out}"), "remove must be one of"),
    "a gate of a fit": (("fit", "planted", "scenes", "--gate", "nan", "--out", "{out}"), "gate must be a finite"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_in_one_line(
    case: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words, *parts = MISTAKES[case]
    said = call(monkeypatch, *(word.format(given=given, out=tmp_path / "out") for word in words))
    assert isinstance(said, str)
    assert len(said.splitlines()) == 1
    assert all(part.replace("/given", str(given)) in said for part in parts), said
    assert "image/s" not in capfd.readouterr().err  # no pass was begun
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["probe", "eval", "study", "demo"])
@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_out_of_range_is_shown_with_its_flag(
    command: str, seed: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = {"demo": (), "eval": ("knn", "planted", "scenes")}.get(command, ("planted", "scenes"))
    assert call(monkeypatch, command, *words, "--seed", seed) == 2
    assert "'--seed'" in capfd.readouterr().err


@pytest.mark.parametrize("value", [2**32, 10**20, 10**400], ids=["2**32", "10**20", "10**400"])
@pytest.mark.parametrize(
    "name",
    ["seed", "max_train_steps", "num_warmup_steps", "gradient_accumulation_steps", "per_device_train_batch_size"],
)
def test_a_number_of_a_training_run_is_one_that_numpy_and_torch_take(name: str, value: int) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} must be below"):
        TrainArguments(**options)


@pytest.mark.parametrize("where", ["build_app", "short_table"])
def test_ctrl_c_ends_a_command_with_one_line(
    where: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    place = {"build_app": cli.__name__, "short_table": "register_adapter.towers.supported"}[where]
    monkeypatch.setattr(f"{place}.{where}", stop)
    assert call(monkeypatch, "families") == 130
    assert capfd.readouterr().err.split("\n")[-2:] == ["error: interrupted", ""]


def test_a_folder_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "has been removed" in str(call(monkeypatch, "families"))


def test_a_training_run_leaves_out_what_its_user_cannot_mend() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with _messages(is_main_process=True, quiet=False):
            warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in said] == ["something else"]
