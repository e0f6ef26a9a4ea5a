"""Data sets with missing labels, columns without images, and sets that overlap: said before anything is trained."""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Image
from PIL import Image as PILImage
from training_cases import relabel

from register_adapter.data.datasets import DataArguments, load_data
from register_adapter.data.images import check_image
from register_adapter.data.stream_loading import load_stream
from register_adapter.evaluation.downstream.samples import refuse_leaks


def encoded(value: int) -> dict[str, Any]:
    file = io.BytesIO()
    PILImage.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


IMAGES = [encoded(value) for value in range(8)]
CASES: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "numbers in place of images": (
        {"train": {"image": list(range(8)), "label": [0, 1] * 4}},
        "column 'image' of .* holds int64",
    ),
    "some without a label": (
        {"train": {"image": IMAGES, "label": [0, 1, None, 1, 0, 1, 0, 1]}},
        r"1 of 8 items of .*split train.* have no label \(items 2\)",
    ),
    "a test split without labels": (
        {"train": {"image": IMAGES, "label": [0, 1] * 4}, "test": {"image": IMAGES, "label": [-1] * 8}},
        "8 of 8 items of .*split test.* have no label",
    ),
}


def write(folder: Path, splits: dict[str, dict[str, Any]]) -> Path:
    folder.mkdir()
    for name, columns in splits.items():
        data = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["cat", "dog"]))
        if isinstance(columns["image"][0], dict):
            data = data.cast_column("image", Image(decode=False))
        data.to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_before_the_run(case: str, tmp_path: Path) -> None:
    splits, message = CASES[case]
    folder = write(tmp_path / "data", splits)
    with pytest.raises(ValueError, match=message):
        load_data(DataArguments(dataset_name=str(folder)), progress=False)


@pytest.mark.parametrize("load", [load_data, load_stream])
def test_a_label_that_is_of_no_class_is_refused(load: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"train": {"image": IMAGES, "label": [0, 1] * 4}})
    relabel(folder / "train.parquet", 5, 99)
    with pytest.raises(ValueError, match=r"item 5 of .* has the label 99, and there are 2 classes"):
        load(DataArguments(dataset_name=str(folder), max_eval_samples=7), progress=False)


@pytest.mark.parametrize("load", [load_data, load_stream])
def test_a_class_that_the_training_split_lacks_names_the_data_set(load: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, second in (("train", "dog"), ("validation", "cow")):
        data = Dataset.from_dict({"image": IMAGES, "label": ["cat", second] * 4})
        data.cast_column("image", Image(decode=False)).to_parquet(folder / f"{name}.parquet")
    with pytest.raises(ValueError, match=f"the data set {folder} cannot be read .*cow|does not name its classes"):
        load(DataArguments(dataset_name=str(folder)), progress=False)


def test_a_stream_that_is_shorter_than_the_evaluation_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"train": {"image": IMAGES, "label": [0, 1] * 4}})
    with pytest.raises(ValueError, match=r"none is left to train on\. Give --max-eval-samples a number below 8"):
        load_stream(DataArguments(dataset_name=str(folder), streaming=True), progress=False)


@pytest.mark.parametrize("name", ["dataset_name", "train_dir"])
def test_an_empty_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name of the images is empty"):
        DataArguments(**{name: ""})


@pytest.mark.parametrize("source", [None, {"bytes": None, "path": None}])
def test_no_image_at_all_is_called_so(source: Any) -> None:
    assert check_image(source) == "there is no image"


def photographs(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            PILImage.new("RGB", (8, 8), (index, 0, len(folder.name))).save(folder / name / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("train", "validation", "warns"), [("a", "a", True), ("a", "link", True), (".", "a", True), ("a", "b", False)]
)
def test_images_that_are_trained_on_are_no_evaluation(
    train: str, validation: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        photographs(tmp_path / name)
    (tmp_path / "link").symlink_to("a")
    args = DataArguments(train_dir=str(tmp_path / train), validation_dir=str(tmp_path / validation))
    with caplog.at_level(logging.WARNING):
        load_data(args, progress=False, labelled=False)
    assert ("images that are trained on" in caplog.text) is warns


def test_bad_files_that_are_alike_are_no_leak(tmp_path: Path) -> None:
    folders = [photographs(tmp_path / name) for name in ("first", "second_")]
    files = []
    for folder in folders:
        (folder / "empty.png").touch()
        (folder / "page.png").write_text("<html>not there</html>")
        files.append(sorted(folder.rglob("*.png")))
    refuse_leaks(*files)
    shutil.copy(files[0][0], folders[1] / "copy.png")
    with pytest.raises(ValueError, match="1 of 9 test images are training images too"):
        refuse_leaks(files[0], [*files[1], folders[1] / "copy.png"])
    pixels = [np.full((4, 4, 3), 7, np.uint8)]
    with pytest.raises(ValueError, match="1 of 1 test images"):
        refuse_leaks(*[list(map(PILImage.fromarray, pixels)) for _ in range(2)])
