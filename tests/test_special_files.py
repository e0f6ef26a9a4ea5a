"""Pipes where files are expected: nothing waits for them; and files whose header says more than anybody would read."""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import nn

from register_adapter import RegisterConfig, add_registers, compose
from register_adapter.artifacts import ArtifactReport
from register_adapter.artifacts.detector import AttentionDetector, DetectorConfig
from register_adapter.commands.runs.inputs import load_base
from register_adapter.commands.runs.tasks import EvalArguments, run_eval
from register_adapter.data import DataArguments, load_data, load_image, load_image_processor
from register_adapter.data.images import walk_files
from register_adapter.errors import AdapterFileError
from register_adapter.export.saved import _transformers
from register_adapter.testbed import load_vit
from register_adapter.towers.supported import write_table
from register_adapter.training import TrainArguments, checkpoints, train
from register_adapter.training import load_base as load_trained
from register_adapter.training.objectives import ClassificationObjective
from register_adapter.tuner.composed import one_adapter
from register_adapter.utils.adapter_file import check_finite, read_tensors
from register_adapter.utils.files import check_regular, checksum, open_regular, read_text
from register_adapter.utils.hub import CONFIG_NAME, WEIGHTS_NAME
from register_adapter.utils.readme import read_readme


def load_state(folder: Path) -> Any:
    linear = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters())
    return checkpoints.load(folder, Accelerator(cpu=True), linear, optimizer, None)


#: What reads: the name of the pipe in the folder, and the call.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "image": ("x.png", lambda folder: load_image(folder / "x.png")),
    "checksum": ("x", lambda folder: checksum(folder / "x")),
    "text": ("x", lambda folder: read_text(folder / "x")),
    "weights": ("x", lambda folder: read_tensors(folder / "x")),
    "detector": ("x.safetensors", lambda folder: AttentionDetector.load(folder / "x.safetensors")),
    "report": ("audit.json", lambda folder: ArtifactReport.load(folder / "audit.json")),
    "document": ("README.md", lambda folder: write_table(folder / "README.md", "")),
    "processor": ("preprocessor_config.json", lambda folder: load_image_processor(str(folder))),
    "model": ("config.json", lambda folder: load_base(str(folder))),
    "base of an export": ("model.safetensors", lambda folder: _transformers(str(folder), {})),
    "base of a training": (
        "config.json",
        lambda folder: load_trained(ClassificationObjective(["a"]), str(folder)),
    ),
    "data set": ("train.csv", lambda folder: load_data(DataArguments(dataset_name=str(folder)))),
    "checkpoint's numbers": ("train_state.json", lambda folder: checkpoints.read_state(folder, {})),
    "checkpoint's tensors": ("train_state.pt", load_state),
}


def test_a_checkpoints_tensors_take_no_more_memory_than_the_file(tmp_path: Path) -> None:
    torch.save({"optimizer": torch.zeros(2**20)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "train_state.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert torch.load(tmp_path / "train_state.pt")["optimizer"].numel() == 2**20, "torch unpacks it"
    with pytest.raises(checkpoints.CheckpointError, match=r"train_state\.pt cannot be loaded .*unpacks to 4"):
        load_state(tmp_path)


@pytest.mark.parametrize("kind", READERS)
def test_a_pipe_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    name, reads = READERS[kind]
    os.mkfifo(tmp_path / name)
    with pytest.raises((OSError, ValueError), match=rf"{name}.*regular file"):
        reads(tmp_path)


def test_a_file_that_becomes_a_pipe_meanwhile_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("")
    regular = (tmp_path / "x").stat()
    (tmp_path / "x").unlink()
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(Path, "stat", lambda self, **_: regular)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "x")


def test_a_folder_is_no_file_and_a_pipe_further_down_is_found_where_it_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"):
        open_regular(tmp_path)
    (tmp_path / "deeper").mkdir()
    os.mkfifo(tmp_path / "deeper" / "x")
    check_regular(tmp_path)
    check_regular(tmp_path / "nowhere")
    with pytest.raises(OSError, match="not a regular file"):
        check_regular(tmp_path, deep=True)


def test_a_text_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(2**29)
    with pytest.raises(ValueError, match="536870912 bytes"):
        read_text(tmp_path / "x")


def test_an_earlier_result_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "eval.json").open("wb") as file:
        file.truncate(2**29)
    with pytest.raises(ValueError, match=r"eval\.json is no result") as caught:
        run_eval(EvalArguments("knn", "planted", "scenes", output_dir=str(tmp_path)))
    assert "536870912 bytes" in str(caught.value.__cause__)


def test_a_readme_that_is_far_too_large_is_left_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (tmp_path / "README.md").open("wb") as file:
        file.truncate(2**23)
    caplog.set_level("WARNING", "register_adapter")
    add_registers(load_vit(), 1).save_pretrained(tmp_path)
    assert "README.md is not a file of at most 4194304 bytes that can be read, and is left as it is" in caplog.text
    assert (tmp_path / "README.md").stat().st_size == 2**23
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", CONFIG_NAME, WEIGHTS_NAME}
    caplog.clear()
    assert read_readme(tmp_path / "README.md") is None
    assert "left as it is" in caplog.text


def _trained(folder: Path) -> None:
    items = [{"pixel_values": torch.zeros(3, 80, 80), "labels": 0, "index": 0}] * 2
    args = TrainArguments(output_dir=str(folder), max_train_steps=1, use_cpu=True, quiet=True)
    train(add_registers(load_vit(), 1), ClassificationObjective(), items, args)


@pytest.mark.parametrize(
    "save",
    [
        lambda folder: add_registers(load_vit(), 1).save_pretrained(folder),
        lambda folder: compose(load_vit(), {"regs": RegisterConfig(num_registers=1)}).save_pretrained(folder),
        _trained,
    ],
    ids=["registers", "composed", "a run"],
)
def test_a_readme_that_may_not_be_read_is_left_as_it_is(
    save: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    readme = tmp_path / "README.md"
    readme.write_bytes(b"somebody's")
    opened = open

    def refusing(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path) == str(readme):  # root may read every file
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", refusing)
        patched.setattr("io.open", refusing)
        caplog.set_level("WARNING", "register_adapter")
        save(tmp_path)
    assert "README.md is not a file of at most 4194304 bytes that can be read, and is left as it is" in caplog.text
    assert readme.read_bytes() == b"somebody's"
    assert list(tmp_path.rglob(WEIGHTS_NAME))


def header(path: Path, entries: dict[str, Any], size: int) -> Path:
    """A safetensors file with a header, and ``size`` bytes of nothing behind it."""
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)
    return path


def detector_header(**extra: Any) -> dict[str, Any]:
    config = json.dumps({"format_version": 1, **DetectorConfig(2, 2, ("entropy",), width=4).to_dict()})
    return {"__metadata__": {"format": "pt", "register_adapter_detector": config}, **extra}


MANY = [1] * 100_000
LARGE = {"dtype": "F32", "shape": [2**33], "data_offsets": [0, 2**35]}


@pytest.mark.parametrize(
    ("entries", "size", "said"),
    [
        (detector_header(x={"dtype": "F32", "shape": MANY, "data_offsets": [0, 4]}), 4, "at most 8 sizes"),
        (detector_header(x=LARGE), 2**35, r"unknown tensors \['x'\]"),  # 32 GB that are on no disk
        (detector_header(spread=LARGE), 2**35, r"spread is torch.float32 \(8589934592,\)"),
    ],
    ids=["dimensions", "unknown tensor", "shape"],
)
def test_a_detector_is_refused_by_its_header(entries: dict[str, Any], size: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=said):
        AttentionDetector.load(header(tmp_path / "x.safetensors", entries, size))


def test_tensors_of_the_base_in_a_lora_are_refused_before_a_value_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LoraConfig(target_modules=["query"]).save_pretrained(tmp_path)
    entries = {"base_model.model.pooler.weight": {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]}}
    header(tmp_path / WEIGHTS_NAME, entries, 2**30)
    monkeypatch.setattr(one_adapter, "read_tensors", lambda path: pytest.fail("has read a gigabyte"))
    with pytest.raises(AdapterFileError, match=r"the method LORA does not have: \['base_model\.model\.pooler"):
        one_adapter.read_alone(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_of_a_file_are_looked_at_where_they_lie(dtype: torch.dtype) -> None:
    # A tensor of a wrong shape may be gigabytes of zeros, which cost no memory until they are copied.
    tensors = {"lora_A.weight": torch.zeros(2**20, dtype=dtype)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        check_finite(tensors, "x")
    taken = [event.self_cpu_memory_usage for event in profile.key_averages()]
    assert max(taken, default=2**30) < 2**12
    for value in (-math.inf, math.nan, -1e30):
        tensors["lora_A.weight"][7] = value
        with pytest.raises(AdapterFileError, match=r"lora_A\.weight has values"):
            check_finite(tensors, "x")


def test_weights_of_many_dimensions_are_refused_wherever_they_are_read(tmp_path: Path) -> None:
    entries = {"x": {"dtype": "F32", "shape": MANY, "data_offsets": [0, 4]}}
    with pytest.raises(AdapterFileError, match="at most 8 sizes"):
        read_tensors(header(tmp_path / "x.safetensors", entries, 4))


def test_a_folder_that_cannot_be_listed_stands_for_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("closed"):  # root may list every folder
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert walk_files(tmp_path) == [tmp_path / "closed", tmp_path / "open" / "x.png"]
    with pytest.raises(ValueError, match=r"closed: a folder whose files cannot be listed \(Permission denied\)"):
        load_image(tmp_path / "closed")
