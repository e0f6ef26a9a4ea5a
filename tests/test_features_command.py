"""Features in a file: the rows of ``get_features``, written as they come, whole or not at all; and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from command_line import call, run_here
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file

from register_adapter import add_registers, get_features
from register_adapter.data import ImageFileError
from register_adapter.features import write_features
from register_adapter.features.extraction import files, reading
from register_adapter.testbed import SceneDataset, load_image_processor, load_vit

ENDINGS = tuple(files.WRITERS)
BAD = (0, 4)


@pytest.fixture(scope="module")
def vit() -> Any:
    return load_vit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images; the first and the fifth are damaged, and the last has a name that is not ASCII."""
    root = tmp_path_factory.mktemp("images")
    scenes = SceneDataset(7, seed=8, split=None)
    for number in range(7):
        path = root / f"{number}{' à' if number == 6 else ''}.png"
        scenes[number]["image"].save(path)
        if number in BAD:
            path.write_bytes(path.read_bytes()[:60])
    return root


def _read(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], list[str]]:
    """Columns, and names of files, read as others read them."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        names = tensors.pop("files").numpy().tobytes().decode().split("\0")
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}, names
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache")).with_format("numpy")
    return {name: np.asarray(rows[:][name]) for name in rows.column_names if name != "file"}, list(rows[:]["file"])


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("file_dtype", ["float32", "float16"])
def test_the_file_has_the_rows_of_the_call(
    vit: Any, folder: Path, tmp_path: Path, ending: str, file_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PART", 1000)  # so that what is moved has several parts
    monkeypatch.setattr(files, "_GROUP", 1)
    options: Any = {"what": ["patch", "cls"], "image_processor": load_image_processor(), "batch_size": 2}
    table = get_features(vit, folder, **options)
    path = tmp_path / f"features{ending}"
    written = write_features(vit, folder, path, file_dtype=file_dtype, metadata={"model": "mine"}, **options)
    columns, names = _read(path)
    for kind in ("patch", "cls"):
        np.testing.assert_array_equal(columns[kind], table[kind].to(getattr(torch, file_dtype)).float().numpy())
    assert columns["index"].tolist() == [1, 2, 3, 5, 6]
    assert tuple(names) == table.files == ("1.png", "2.png", "3.png", "5.png", "6 à.png")
    assert (written.rows, written.grid, written.nbytes) == (5, (10, 10), path.stat().st_size)
    assert written.shapes == {"patch": (5, 100, 128), "cls": (5, 128)}
    assert len(written.skipped) == len(BAD)
    assert [item.name for item in tmp_path.iterdir() if item.is_file()] == [path.name]


def test_both_kinds_of_file_say_how_features_were_read(vit: Any, folder: Path, tmp_path: Path) -> None:
    said = []
    for ending in ENDINGS:
        path = tmp_path / f"features{ending}"
        options: Any = {"image_processor": load_image_processor(), "metadata": {"model": "mine"}}
        write_features(vit, folder, path, -2, "keys", norm=False, **options)
        if ending == ".parquet":
            known = parquet.read_metadata(path).metadata
            said.append({key.decode(): value.decode() for key, value in known.items() if key != b"ARROW:schema"})
        else:
            said.append(safe_open(path, "pt").metadata())
    assert said[0] == said[1]
    wanted = {"layer": "7", "norm": "False", "grid": "10x10", "pixel_values": "3x80x80", "model": "mine"}
    assert wanted.items() <= said[0].items()


def test_bfloat16_is_for_safetensors_alone(vit: Any, tmp_path: Path) -> None:
    pixels = torch.randn(2, 3, 80, 80)
    path = tmp_path / "features.safetensors"
    write_features(vit, pixels, path, what="mean", file_dtype="bfloat16")
    assert load_file(path)["mean"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="parquet has no bfloat16"):
        write_features(vit, pixels, tmp_path / "features.parquet", file_dtype="bfloat16")


@pytest.mark.parametrize("ending", ENDINGS)
def test_rows_do_not_wait_in_memory(vit: Any, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a batch is read, what came before the last row group is in the file."""
    group = 4 * 100 * 128 * 4
    monkeypatch.setattr(files, "_GROUP", group)
    sizes: list[int] = []
    own = reading.TokenReader.take

    def take(self: Any, batch: Any) -> None:
        own(self, batch)
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("features*")))

    monkeypatch.setattr(reading.TokenReader, "take", take)
    write_features(vit, torch.randn(24, 3, 80, 80), tmp_path / f"features{ending}", batch_size=2)
    assert len(sizes) == 12
    assert all(size > (2 * number - 2 - 4) * 100 * 128 * 4 for number, size in enumerate(sizes) if number > 3)


# What is refused, and what is left then


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_error_leaves_the_file_that_was_there(vit: Any, folder: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"features{ending}"
    path.write_bytes(b"before")
    options: Any = {"image_processor": load_image_processor(), "strict": True, "batch_size": 2}
    with pytest.raises(ImageFileError, match=r"4\.png"):
        write_features(vit, sorted(folder.iterdir())[1:], path, **options)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"before"


def test_what_does_not_fit_is_refused_before_it_is_written(
    vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from register_adapter.features import store

    monkeypatch.setattr(store.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10_000}))
    with pytest.raises(store.StoreError, match=r"the features of 3 images take .* choose another disk or fewer images"):
        write_features(vit, torch.randn(3, 3, 80, 80), tmp_path / "below" / "features.parquet")
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    large = load_vit()
    with torch.no_grad():
        large.vit.layernorm.weight *= 1e6
    with pytest.raises(ValueError, match=r"not finite as float16 \(float16 ends at 65504"):
        write_features(large, torch.randn(1, 3, 80, 80), tmp_path / "features.parquet", file_dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_number_of_images_that_is_not_known(vit: Any, tmp_path: Path) -> None:
    pixels = torch.randn(3, 3, 80, 80)
    with pytest.raises(ValueError, match="not known before, which a safetensors file needs"):
        write_features(vit, iter([pixels]), tmp_path / "features.safetensors")
    assert write_features(vit, iter([pixels]), tmp_path / "features.parquet").rows == 3


# The command


def test_the_command(folder: Path, tmp_path: Path) -> None:
    adapter, path = tmp_path / "adapter", tmp_path / "new" / "features.parquet"
    add_registers(load_vit(), 2).save_pretrained(adapter)
    common = ("features", "clean", str(folder), "--adapter", str(adapter), "--out", str(path), "--what", "registers")
    said = run_here(*common, "--what", "mean", "--layer", "3", "--dtype", "float16")
    assert "7 images of" in said
    assert "0.png" in said
    assert "registers: 5 × 2 × 128 float16" in said
    assert "halffloat" in str(parquet.read_schema(path).field("mean").type)
    assert _read(path)[1][-1] == "6 à.png"
    said = run_here(*common, "--json", "--quiet")
    report = json.loads(said[said.index("{") :])
    assert (report["rows"], report["columns"], report["dtype"]) == (5, {"registers": [5, 2, 128]}, "float32")
    assert len(report["skipped"]) == len(BAD)


def test_the_command_refuses_before_images_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")

    def said(*arguments: str) -> str:
        monkeypatch.setattr("register_adapter.commands.runs.features.load_base", lambda name: pytest.fail("too late"))
        return str(call(monkeypatch, "features", "clean", *arguments))

    assert "is a file; name a folder" in said(str(folder), "--out", str(tmp_path / "file" / "features.parquet"))
    assert "must end with .safetensors or .parquet" in said(str(folder), "--out", str(tmp_path / "features.npz"))
    assert "has no name before its ending" in said(str(folder), "--out", str(tmp_path / ".parquet"))
    assert "neither a folder nor a file" in said(str(tmp_path / "no"), "--out", str(tmp_path / "features.parquet"))
    assert "parquet has no bfloat16" in said(str(folder), "--out", str(tmp_path / "a.parquet"), "--dtype", "bfloat16")
