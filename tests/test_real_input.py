"""Real photographs and the files that lie among them: what is read, with which pixels, and what is refused by name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from peft import AutoPeftModel
from PIL import Image as PILImage
from processes import run_module
from training_helpers import load_example, write_photographs, write_vit

from register_adapter.data import DataArguments, ImageFileError, check_image, load_data, load_image, read_image_folder
from register_adapter.data.datasets import skip_bad
from register_adapter.training.launch import main

CLASSES = ["cat", "coffee", "flower"]
photographs = load_example("real_photographs")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vit(tmp_path_factory.mktemp("model") / "vit", ["a", "b"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    return write_photographs(folder, "--size", "48", "--crops", "6", "--bad", "--classes", *CLASSES)


def arguments(vit: Path, photos: Path, out: Path) -> list[str]:
    command = ["--model_name_or_path", str(vit), "--output_dir", str(out), "--max_train_steps", "3"]
    return [*command, "--train_dir", str(photos / "train"), "--validation_dir", str(photos / "validation")]


@pytest.mark.slow
def test_training_goes_on_past_bad_files_and_names_them(vit: Path, photos: Path, tmp_path: Path) -> None:
    done = run_module("register_adapter.train", *arguments(vit, photos, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    named = {Path(line.partition(": ")[0]).name for line in results["skipped"]}
    assert named == set(photographs.BROKEN)
    for name in photographs.BROKEN:
        assert str(photos / "train" / "cat" / name) in done.stderr
    listed = sum(path.is_file() for path in (photos / "train").rglob("*"))
    assert results["train_samples"] == listed - len(photographs.BROKEN)
    assert results["global_step"] == 3
    assert results["objective"]["labels"] == CLASSES
    model = AutoPeftModel.from_pretrained(tmp_path / "out")
    assert model.get_base_model().classifier.modules_to_save["default"].out_features == len(CLASSES)


def test_strict_refuses_and_names_the_bad_files(
    vit: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*arguments(vit, photos, tmp_path / "out"), "--strict"])
    assert exit_.value.code == 1
    messages = capsys.readouterr().err
    for name in photographs.BROKEN:
        assert name in messages
    assert "Traceback" not in messages
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("size", [32, 96])
def test_broken_files_of_the_example_are_broken_at_any_size(size: int, tmp_path: Path) -> None:
    for name in photographs.PHOTOGRAPHS:
        (tmp_path / name).mkdir()
        photographs.write_awkward(tmp_path / name, photographs.photograph(name).crop((0, 0, size, size)))
        found = {path.name for path in (tmp_path / name).iterdir() if check_image(path)}
        assert found == set(photographs.BROKEN)


def test_a_class_without_a_good_file_keeps_its_number(photos: Path, tmp_path: Path) -> None:
    for name, files in {"a": ["bad.jpg"], "b": ["bad.png", "good.png"], "c": ["good.png"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(b"nothing")
            if file == "good.png":
                PILImage.new("RGB", (8, 8)).save(tmp_path / name / file)
    listed = read_image_folder(tmp_path)
    kept, faults = skip_bad(listed)
    assert kept.features["label"].names == ["a", "b", "c"]
    assert kept["label"][:] == [1, 2]
    assert len(faults) == 2
    assert all("bad." in line for line in faults)
    with pytest.raises(ImageFileError, match=r"bad\.jpg.*bad\.png"):
        skip_bad(listed, strict=True)


def test_only_bad_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"")
    with pytest.raises(ImageFileError, match=r"none of 1 files.*x\.jpg: the file is empty"):
        skip_bad(read_image_folder(tmp_path))


def test_header_check_misses_what_the_full_check_finds(photos: Path) -> None:
    truncated = photos / "train" / "cat" / "truncated.jpg"
    assert check_image(truncated, decode=False) is None
    assert "damaged" in str(check_image(truncated))


def pixels(image: PILImage.Image, tmp_path: Path, name: str, **options: Any) -> np.ndarray[Any, Any]:
    image.save(tmp_path / name, **options)
    read = load_image(tmp_path / name)
    assert read.mode == "RGB"
    return np.asarray(read)


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 25700], [32896, 65278, 65535]], np.uint16)
    for name in ("deep.png", "deep.tif"):
        loaded = pixels(PILImage.fromarray(values), tmp_path, name)
        assert loaded[..., 0].tolist() == [[0, 1, 100], [128, 254, 255]]
        assert (loaded == loaded[..., :1]).all()


def test_float_images_are_read_from_zero_to_one_and_refused_beyond(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert pixels(PILImage.fromarray(values), tmp_path, "float.tif")[..., 0].tolist() == [[0, 128, 255]]
    for index, bad in enumerate((values * 300, values - 1, np.full((1, 3), np.nan, np.float32))):
        PILImage.fromarray(bad).save(tmp_path / f"bad{index}.tif")
        with pytest.raises(ImageFileError, match=rf"bad{index}\.tif.*float values"):
            load_image(tmp_path / f"bad{index}.tif")
    PILImage.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(ImageFileError, match=r"wide\.tif.*integer values from 0 to 70000"):
        load_image(tmp_path / "wide.tif")


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    values = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    loaded = pixels(PILImage.fromarray(values, "RGBA"), tmp_path, "see.png")
    assert loaded.tolist() == [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]
    grey = np.array([[[100, 255], [100, 0]]], np.uint8)
    assert pixels(PILImage.fromarray(grey, "LA"), tmp_path, "la.png").tolist() == [[[100] * 3, [255] * 3]]
    palette = PILImage.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(palette, tmp_path, "p.png").tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert pixels(palette, tmp_path, "pt.png", transparency=1).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_grey_and_cmyk(tmp_path: Path) -> None:
    assert pixels(PILImage.new("L", (1, 1), 77), tmp_path, "grey.png").tolist() == [[[77, 77, 77]]]
    assert pixels(PILImage.new("1", (1, 1), 1), tmp_path, "bit.png").tolist() == [[[255, 255, 255]]]
    ink = PILImage.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert pixels(ink, tmp_path, "ink.tif")[0, 0].tolist() == [255, 0, 0]
    # A CMYK JPEG stores ink upside down; read naively it would be black and cyan.
    assert np.abs(pixels(ink, tmp_path, "ink.jpg").astype(int)[4, 4] - [255, 0, 0]).max() <= 3


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [PILImage.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.webp", "pages.tif"):
        options = {"lossless": True} if name.endswith("webp") else {}
        loaded = pixels(frames[0], tmp_path, name, save_all=True, append_images=frames[1:], **options)
        assert loaded.shape == (4, 4, 3)
        assert loaded[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = PILImage.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = PILImage.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored left edge is the top
    loaded = pixels(image, tmp_path, "turned.png", exif=exif)
    assert loaded.shape == (4, 2, 3)
    assert loaded[0, 1].tolist() == [0, 0, 0]


def test_postscript_is_never_interpreted(tmp_path: Path) -> None:
    (tmp_path / "print.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    assert "not an image" in str(check_image(tmp_path / "print.jpg"))


def test_every_awkward_file_that_is_whole_is_read(photos: Path) -> None:
    folder = photos / "train" / "cat"
    expected = np.asarray(photographs.photograph("cat").crop((0, 0, 48, 48))).astype(float)
    grey = np.asarray(load_image(folder / "grey.png")).astype(float)
    assert np.abs(np.asarray(load_image(folder / "sixteen_bit.png")) - grey).max() == 0
    assert np.abs(np.asarray(load_image(folder / "cmyk.jpg")) - expected).mean() < 8
    assert np.abs(np.asarray(load_image(folder / "animated.gif")) - expected).mean() < 12
    alpha = grey / 255
    assert np.abs(np.asarray(load_image(folder / "rgba.png")) - (alpha * expected + 255 * (1 - alpha))).max() <= 1.5


def encoded(colour: str) -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def test_a_dataset_with_other_columns_and_labels_by_name(tmp_path: Path) -> None:
    names = ["dog", "cat", "dog", "eel", "cat", "eel"]
    images = [{"bytes": encoded("red"), "path": f"{index}.png"} for index in range(6)]
    images[3]["bytes"] = b"broken"
    features = Features({"picture": Image(), "animal": Value("string")})
    data = Dataset.from_dict({"picture": images, "animal": names}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    flags = {"dataset_name": str(tmp_path), "image_column_name": "picture", "label_column_name": "animal"}
    loaded = load_data(DataArguments(**flags, train_val_split=0.34))
    assert loaded.labels == ["cat", "dog", "eel"]
    assert loaded.validation_name == f"{loaded.name}, images that were held out"  # a card tells what it was measured on
    assert len(loaded.train) + len(loaded.validation) == 5
    assert [line.partition(":")[0] for line in loaded.skipped] == ["3.png"]
    kept = [loaded.labels[label] for part in (loaded.train, loaded.validation) for label in part["label"]]
    assert sorted(kept) == ["cat", "cat", "dog", "dog", "eel"]
    with pytest.raises(ValueError, match=r"no columns \['label'\].*animal"):
        load_data(DataArguments(dataset_name=str(tmp_path), image_column_name="picture"))


def test_folders_that_are_no_image_folders(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        read_image_folder(tmp_path / "missing")
    (tmp_path / "loose.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="has no sub-folders"):
        read_image_folder(tmp_path)
    (tmp_path / "zebra").mkdir()
    (tmp_path / ".cache").mkdir()
    with pytest.raises(ValueError, match="has no files in its class folders"):
        read_image_folder(tmp_path)
    with pytest.raises(ValueError, match=r"classes \['zebra'\], which the training set lacks"):
        read_image_folder(tmp_path, CLASSES)
