"""Files of a user that are cut, edited or of another kind: one line that names the file, and no wrong figure."""

from __future__ import annotations

import copy
import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from register_adapter.artifacts import ArtifactReport, audit
from register_adapter.data.folders import read_captioned_folder
from register_adapter.data.texts import read_prompts
from register_adapter.evaluation.discovery import read_coco
from register_adapter.evaluation.discovery.annotations import read_lines
from register_adapter.evaluation.downstream.dense_images import DenseImage, to_classes
from register_adapter.evaluation.downstream.zero_shot import read_classes, read_templates
from register_adapter.features.extraction.files import FileSpec, opened_writer
from register_adapter.studies.arms import ARMS
from register_adapter.studies.records import Records
from register_adapter.training.checkpoints import CheckpointError, read_state
from register_adapter.training.flags.config_file import config_value
from register_adapter.tuner.card import _read_record
from register_adapter.utils.staging import staged

DEEP = "[" * 100_000
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "COCO": ("boxes.json", lambda path: read_coco(path, path.parent)),
    "classes": ("classes.json", read_classes),
    "templates": ("templates.json", read_templates),
    "prompts": ("prompts.json", read_prompts),
    "captions": ("metadata.jsonl", lambda path: read_captioned_folder(path.parent, "text")),
    "settings of a study": ("settings.json", lambda path: Records(path.parent).check({"seed": 0})),
    "audit of a study": ("audit.json", lambda path: Records(path.parent).audit()),
}


@pytest.mark.parametrize("text", [DEEP, "", "null", "7", '["a", 1]', '{"images": [1], "annotations": [1]}'])
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_named(reader: str, text: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each has words of its own
        read(tmp_path / name)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("reader", [*READERS, "lines of templates", "lines of prompts", "list of VOC"])
def test_a_file_that_is_no_utf8_is_named(reader: str, tmp_path: Path) -> None:
    plain: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "lines of templates": ("templates.txt", read_templates),
        "lines of prompts": ("prompts.txt", read_prompts),
        "list of VOC": ("trainval.txt", read_lines),
    }
    name, read = (READERS | plain)[reader]
    (tmp_path / name).write_bytes("café {}\n".encode("latin-1"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each has words of its own
        read(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_half_a_surrogate_pair_is_no_name_of_an_image(tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text('{"images": [{"id": 1, "file_name": "\\ud800.jpg"}], "annotations": []}', "utf-8")
    with pytest.raises(ValueError, match=r"boxes\.json is not an annotation file"):
        read_coco(path, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": "\\ud800.png", "text": "a"}',
        '{"file_name": "a.png", "text": ["b", "\\ud800"]}',
        '{"file_name": "a\\u0000.png", "text": "a"}',
        '{"file_name": "", "text": "a"}',
        '{"file_name": "/etc/a.png", "text": "a"}',
        '{"file_name": "b/../../a.png", "text": "a"}',
    ],
)
def test_a_caption_that_no_file_or_text_can_be_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(f"\n{line}", "utf-8")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2"):
        read_captioned_folder(tmp_path, "text")


_FIGURES = {
    **{"verdict": "none", "outlier_share": 0, "largest_ratio": 1.5, "attention_on_outliers": None},
    **{"attention_gathered": 0.2, "drift": 0.1, "clean_kept": 0.9, "task": None},
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("figures.json", {"report": {**_FIGURES, "drift": value}}) for value in ("x", None, True, [], 10**400)),
        ("figures.json", {"choose": {**_FIGURES, "clean_kept": float("nan")}}),
        ("figures.json", {"choose": {**_FIGURES, "task": float("inf")}}),
        ("figures.json", {"report": {**_FIGURES, "verdict": "fine"}}),
        ("figures.json", {"report": {**_FIGURES, "verdict": []}}),
        *(("figures.json", {side: None}) for side in ("choose", "report")),
        ("figures.json", {"choose": None, "report": None}),
        ("figures.json", {"choose": None, "report": None, "why_not": "the base can always be made"}),
        ("figures.json", {"why_not": 7}),
        ("figures.json", {"why_not": "it was made"}),
        *(("times.json", {"seconds": value}) for value in (10**400, float("nan"), "1", True)),
    ],
)
def test_figures_of_a_study_that_cannot_be_are_named(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    records = Records(tmp_path)
    files: dict[str, dict[str, Any]] = {
        "figures.json": {"choose": _FIGURES, "report": _FIGURES, "why_not": None},
        "times.json": {"seconds": 2},
    }
    place = records.place(ARMS[0], 0)
    place.mkdir(parents=True)
    for file, values in files.items():
        (place / file).write_text(json.dumps(values), "utf-8")
    read = records.read(ARMS[0], 0)
    assert read is not None
    assert read.seconds == 2
    (place / name).write_text(json.dumps(files[name] | change), "utf-8")
    with pytest.raises(ValueError, match="is damaged") as caught:
        records.read(ARMS[0], 0)
    assert f"remove {place}" in str(caught.value)


def test_a_report_nested_too_deeply_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text(DEEP, "utf-8")
    with pytest.raises(ValueError, match="nested too deeply"):
        ArtifactReport.load(tmp_path / "audit.json")


@pytest.fixture(scope="module")
def report_values() -> dict[str, Any]:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    model = Dinov2Model(Dinov2Config(image_size=28, patch_size=7, **size)).eval()
    return audit(model, torch.rand(4, 3, 28, 28), progress=False, sinks=True).to_dict()


@pytest.mark.parametrize(
    ("way", "value"),
    [
        (["evidence"], float("nan")),
        (["verdict"], "perhaps"),
        (["num_images"], "many"),
        (["num_images"], True),
        (["first_layer"], 99),
        (["first_layer"], -1),
        (["layers"], []),
        (["grid"], [4]),
        (["rule"], None),
        (["definitions"], {"norm": 3}),
        (["layers", 1, "outlier_share"], "0.1"),
        (["layers", 1, "outlier_share"], float("nan")),
        (["layers", 1, "norms"], {}),
        (["layers", 1, "norms", "patch", "quantiles"], {}),
        (["layers", 1, "norms", "patch", "edges"], {"0": 1}),
        (["layers", 1, "threshold", "high"], "3"),
        (["layers", 1, "attention", "from_all"], [0.1]),
        (["sinks", "advice"], "one string"),
    ],
)
def test_what_no_report_holds_is_refused_by_its_field(
    way: list[Any], value: Any, tmp_path: Path, report_values: dict[str, Any]
) -> None:
    values = copy.deepcopy(report_values)
    assert ArtifactReport.from_dict(values).to_dict() == values
    *path, last = way
    inner = values
    for step in path:
        inner = inner[step]
    assert last in inner or isinstance(inner, list)
    inner[last] = value
    with pytest.raises((TypeError, ValueError), match=str(last)):
        ArtifactReport.from_dict(values)
    # A study says which file it is, and what to remove.
    records = Records(tmp_path)
    (tmp_path / "audit.json").write_text(json.dumps(values), "utf-8")
    with pytest.raises(ValueError, match=r"audit\.json is damaged .*; remove "):
        records.audit()


def test_a_card_whose_record_is_nested_too_deeply_is_one_without() -> None:
    assert _read_record(DEEP) == {}


def test_a_checkpoint_nested_too_deeply_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "train_state.json").write_text(DEEP, "utf-8")
    with pytest.raises(CheckpointError, match=r"train_state\.json is damaged"):
        read_state(tmp_path, {})


@pytest.mark.parametrize("file", ["figures.json", "times.json"])
@pytest.mark.parametrize("text", [DEEP, "", "[]", "{}", '{"choose": {"strange": 1}, "report": null, "why_not": null}'])
def test_a_damaged_arm_of_a_study_is_named(file: str, text: str, tmp_path: Path) -> None:
    records, arm = Records(tmp_path), ARMS[-1]
    place = records.place(arm, 0)
    place.mkdir(parents=True)
    (place / "figures.json").write_text(json.dumps({"choose": None, "report": None, "why_not": "x"}), "utf-8")
    (place / "times.json").write_text('{"seconds": 1.0}', "utf-8")
    assert records.read(arm, 0) is not None
    (place / file).write_text(text, "utf-8")
    with pytest.raises(ValueError, match="is damaged") as caught:
        records.read(arm, 0)
    assert str(place) in str(caught.value)


def image_of(path: Path, size: tuple[int, int], orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)
    return path


@pytest.mark.parametrize(
    ("orientation", "shape"),
    [(1, (30, 40)), (1, (15, 20)), (1, (60, 80)), (1, (10, 13)), (3, (30, 40)), (6, (40, 30)), (8, (20, 15))],
)
def test_a_target_of_any_resolution_covers_its_image(orientation: int, shape: tuple[int, int], tmp_path: Path) -> None:
    image = image_of(tmp_path / "a.jpg", (40, 30), orientation)
    assert DenseImage(image, np.zeros(shape, np.uint8), "a").read().shape == shape


@pytest.mark.parametrize(("orientation", "shape"), [(1, (40, 30)), (1, (30, 30)), (6, (30, 40)), (5, (15, 20))])
def test_a_target_that_does_not_cover_its_image_is_refused(
    orientation: int, shape: tuple[int, int], tmp_path: Path
) -> None:
    image, mask = image_of(tmp_path / "a.jpg", (40, 30), orientation), tmp_path / "mask.png"
    Image.fromarray(np.zeros(shape, np.uint8)).save(mask)
    with pytest.raises(ValueError, match="cover the same") as caught:
        DenseImage(image, mask, "a").read()
    assert str(mask) in str(caught.value)


@pytest.mark.parametrize(
    "target",
    [
        np.zeros((0, 0)),
        np.zeros((30, 40), complex),
        np.zeros((30, 40, 3), np.uint8),
        np.full((30, 40), "a"),
        b"no image",
    ],
    ids=["empty", "complex", "colours", "texts", "junk"],
)
def test_a_target_that_is_none_is_named_by_its_file(target: Any, tmp_path: Path) -> None:
    image, path = image_of(tmp_path / "a.jpg", (40, 30)), tmp_path / ("a.png" if isinstance(target, bytes) else "a.npy")
    path.write_bytes(target) if isinstance(target, bytes) else np.save(path, target)
    with pytest.raises(ValueError, match=r"one number a pixel|no target that can be read") as caught:
        DenseImage(image, path, "a").read()
    assert str(path) in str(caught.value)
    assert " at 0x" not in str(caught.value)


def test_a_mask_of_fractions_is_named_by_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((30, 40), 0.5))
    with pytest.raises(ValueError, match=r"a\.npy: a mask must hold whole numbers"):
        DenseImage(image_of(tmp_path / "a.jpg", (40, 30)), tmp_path / "a.npy", "a", to_classes).read()


@pytest.mark.parametrize(
    "text", ["seed: " + "[" * 2**15, "seed: " + "{a: " * 2**13, "seed: [[1]]", "a:\n b:\n  c: 1\n"]
)
def test_settings_that_are_nested_are_refused_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"run\.yaml, line [13]: a flag must have a single value"):
        config_value(tmp_path / "run.yaml", "seed")


@pytest.mark.parametrize("ending", ["safetensors", "parquet"])
@pytest.mark.parametrize("error", [OSError("the camera is gone"), OSError(errno.EFBIG, "File too large")], ids=str)
def test_only_what_writing_makes_go_wrong_is_told_of_the_file(error: OSError, ending: str, tmp_path: Path) -> None:
    path, spec = tmp_path / f"features.{ending}", FileSpec({"cls": (4,)}, "float32", 1)
    said = f"{path} cannot be written: File too large" if error.errno else "the camera is gone"
    with (
        pytest.raises(OSError, match=f"^{re.escape(said)}$"),
        staged(tmp_path) as scratch,
        opened_writer(scratch / path.name, spec),
    ):
        raise error
    assert not path.exists()
