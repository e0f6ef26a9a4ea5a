"""``register-adapter probe`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import call, run_here

from register_adapter import add_registers
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted ViT on disk, an adapter for it, and a folder of images with a file among them that is not one."""
    folder = tmp_path_factory.mktemp("probe")
    model = load_planted_vit().model
    model.save_pretrained(folder / "model")
    load_image_processor().save_pretrained(folder / "model")
    add_registers(model, 2).save_pretrained(folder / "adapter")
    SceneDataset(80, seed=4, split=None).write(folder / "images")
    (next(path for path in (folder / "images").iterdir() if path.is_dir()) / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def probed(folder: Path) -> tuple[Path, str]:
    """Where a model, an adapter and images of one's own were probed, and what was said."""
    out = folder / "probes"
    given = (str(folder / "model"), str(folder / "images"), "--adapter", str(folder / "adapter"))
    return out, run_here("probe", *given, "--out", str(out), "--min_images", "15")


def test_it_names_bad_files_and_prints_the_ablations(probed: tuple[Path, str]) -> None:
    _, said = probed
    assert "notes.txt" in said, "the bad file is named"
    assert "shuffle ablation" in said


def test_the_base_and_the_adapter_are_probed(folder: Path, probed: tuple[Path, str]) -> None:
    probes = json.loads((probed[0] / "probes.json").read_text())
    names = [str(folder / "model"), f"{folder / 'model'} + adapter"]
    assert list(probes) == names
    rows = [[row["tokens"] for row in probes[name]["rows"]] for name in names]
    assert rows == [["normal", "outlier", "CLS"], ["normal", "outlier", "CLS", "register 0", "register 1"]]
    base = probes[names[0]]
    # A fifth of the 81 files is for the rule, and one is not an image.
    assert 63 <= base["num_images"] <= 65
    assert base["threshold"]["rule"] == "auto"
    assert base["threshold"]["separated"]
    assert 0 < base["num_outliers"] < 0.1 * base["num_patches"]
    assert base["rows"][1]["classification"]["estimate"]["value"] >= 0


def test_the_registers_of_the_adapter_are_analysed(folder: Path, probed: tuple[Path, str]) -> None:
    registers = json.loads((probed[0] / "registers.json").read_text())
    ((name, report),) = registers.items()
    assert name == f"{folder / 'model'} + adapter"
    assert [ablation["kind"] for ablation in report["ablations"]] == ["mean", "shuffle"]
    assert report["drift"]["patches"]["value"] > 0
    assert report["accuracy"] is None, "the folder's classes have other names than the head's"


def test_without_classes_only_places_and_pixels_are_probed(folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    scenes = SceneDataset(30, seed=5, split=None)
    for index in range(30):
        scenes[index]["image"].save(flat / f"{index}.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "registers.json").write_text("an earlier run's")
    said = run_here("probe", str(folder / "model"), str(flat), "--out", str(tmp_path / "out"), "--min_images", "20")
    assert "has no registers" in said
    assert not (tmp_path / "out" / "registers.json").exists()
    (report,) = json.loads((tmp_path / "out" / "probes.json").read_text()).values()
    assert report["rows"][0]["classification"] is None
    assert report["rows"][0]["reconstruction_l2"]["estimate"]["value"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rule", "none"), "unknown rule"),
        (("--layer", "99"), "--layer 99 of 9"),
        (("--strict",), "image is bad, and none may be"),
    ],
    ids=str,
)
def test_wrong_arguments_end_in_one_clear_line(
    options: tuple[str, ...], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (str(folder / "model"), str(folder / "images"), "--out", str(tmp_path / "x"))
    said = str(call(monkeypatch, "probe", *given, *options))
    assert said.startswith("error: ")
    assert message in said
    assert not (tmp_path / "x").exists()
