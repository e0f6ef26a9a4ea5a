"""Which outputs are logits, and which label belongs to which picture where some pictures are bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases_base import LABELS
from families import build, make_inputs

from register_adapter import add_registers, find_tower
from register_adapter.data import ImageBatches
from register_adapter.features.passes import read_batches, run_whole
from register_adapter.testbed import SceneDataset, load_image_processor, load_vit

BATCH = 3


def _stack(name: str, **changes: Any) -> Any:
    from stacks_cases import build_stack

    model = build_stack(name)
    for attribute, value in changes.items():
        getattr(model, attribute)(value)
    return model.eval()


#: A model, and the number of classes it tells apart; 0 for one whose output is an embedding.
OUTPUTS: dict[str, tuple[Any, int]] = {
    "vit-classifier": (lambda: build("vit-classifier"), LABELS),
    "vit": (lambda: build("vit"), 0),
    "clip": (lambda: build("clip"), 0),
    "clip-projection": (lambda: build("clip-projection"), 0),
    "timm": (lambda: _stack("timm"), LABELS),
    "timm-embedding": (lambda: _stack("timm", reset_classifier=0), 0),
    "eva-embedding": (lambda: _stack("eva", reset_classifier=0), 0),
    "open_clip": (lambda: _stack("open_clip"), 0),
    "open_clip-whole": (lambda: _stack("open_clip-whole"), 0),
    "torchvision": (lambda: _stack("torchvision"), LABELS),
    "hub": (lambda: _stack("hub"), 0),
}


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("name", OUTPUTS)
def test_only_logits_count_as_logits(name: str, registers: int) -> None:
    make, classes = OUTPUTS[name]
    model = make()
    model = add_registers(model, registers).eval() if registers else model
    pixels = make_inputs("vit", batch=BATCH)["pixel_values"]
    with torch.no_grad():
        logits = run_whole(model, pixels)
    assert (None if logits is None else tuple(logits.shape)) == ((BATCH, classes) if classes else None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures in the order of their names; the fourth and the last are none."""
    scenes = SceneDataset(10, seed=8, split=None)
    for index in range(10):
        path = tmp_path / f"{index}.png"
        scenes[index]["image"].save(path)
        if index in (3, 9):
            path.write_bytes(path.read_bytes()[:60])
    return tmp_path


def test_labels_stay_with_their_pictures_where_others_are_bad(folder: Path) -> None:
    given = np.arange(10) * 11
    pictures = ImageBatches(folder, load_image_processor(), batch_size=4)
    tower = find_tower(load_vit())
    batches = list(read_batches(pictures, given, tower))
    found = np.concatenate([batch.labels for batch in batches])
    assert found.tolist() == [0, 11, 22, 44, 55, 66, 77, 88]
    assert sum(batch.size for batch in batches) == 8
    alone = load_image_processor()([SceneDataset(10, seed=8, split=None)[4]["image"]], return_tensors="pt")
    place = found.tolist().index(44)
    assert torch.equal(torch.cat([batch.inputs["pixel_values"] for batch in batches])[place], alone["pixel_values"][0])


def test_too_few_labels_are_refused(folder: Path) -> None:
    pictures = ImageBatches(folder, load_image_processor(), batch_size=4)
    with pytest.raises(ValueError, match="labels has 8 entries, and there are at least 9 images"):
        list(read_batches(pictures, range(8), find_tower(load_vit())))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_halves_are_the_whole(size: int) -> None:
    pixels = torch.arange(3 * size).reshape(size, 3)
    batches = [{"pixel_values": pixels, "labels": torch.arange(size), "size": torch.tensor(7)}]
    for batch in read_batches(ImageBatches(batches, None), None, find_tower(load_vit())):
        halves = [batch.half(second) for second in (False, True)]
        assert [half.size for half in halves] == [size // 2, size - size // 2]
        assert torch.equal(torch.cat([half.inputs["pixel_values"] for half in halves]), pixels)
        assert np.concatenate([half.labels for half in halves]).tolist() == list(range(size))
