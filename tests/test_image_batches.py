"""Images from anywhere become batches; bad ones are named and left out."""

import logging
import random

import numpy as np
import pytest
import torch
from families import build, make_inputs
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from register_adapter import get_features
from register_adapter.data import ImageBatches, ImageFileError, ProcessedDataset, list_images
from register_adapter.data.batches import batch_length, slice_batch
from register_adapter.data.processing import process_image, settings_of
from register_adapter.testbed import SceneDataset, load_image_processor, load_vit
from register_adapter.viz import attention_map


class Tower(nn.Module):
    def forward(self, pixel_values, bool_masked_pos=None):
        return pixel_values


class Positional(nn.Module):
    def forward(self, x):
        return x


CPU = torch.device("cpu")


def read(images, processor=None, module=None, dtype=torch.float32, **options):
    batches = ImageBatches(images, processor, **options)
    return batches, list(batches.on(CPU, dtype, module or Tower()))


@pytest.fixture
def folder(tmp_path):
    """Seven images, one of them below the others, and what is none."""
    scenes = SceneDataset(7, seed=3, split=None)
    (tmp_path / "below" / "deeper").mkdir(parents=True)
    for index in range(7):
        place = tmp_path / ("below/deeper" if index == 6 else ".")
        scenes[index]["image"].save(place / f"{index}.png")
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / ".hidden.png").write_bytes(whole)
    return tmp_path


def test_a_folder_is_read_in_order_and_bad_files_are_named(folder, caplog):
    processor = load_image_processor()
    with caplog.at_level(logging.WARNING):
        batches, collected = read(folder, processor, batch_size=3, num_workers=3)
    assert batches.total == 10
    made = torch.cat([batch["pixel_values"] for batch in collected])
    expected = [processor(images=SceneDataset(7, seed=3, split=None)[i]["image"])["pixel_values"][0] for i in range(7)]
    assert torch.equal(made, torch.stack([torch.as_tensor(np.asarray(image)) for image in expected]))
    for name in ("zero.jpg", "notes.txt", "cut.png"):
        assert any(name in line for line in batches.skipped)
        assert name in caplog.text
    assert len(batches.skipped) == 3


def test_strict_refuses_and_nothing_good_is_an_error(folder):
    with pytest.raises(ImageFileError, match=r"cut\.png"):
        read(folder, load_image_processor(), strict=True)
    with pytest.raises(ImageFileError, match="none of 1 files"):
        read(folder / "zero.jpg", load_image_processor())


@pytest.mark.parametrize("form", ["paths", "pil", "items", "dataset", "generator", "datasets"])
def test_every_form_of_images_gives_the_same(folder, form):
    scenes = SceneDataset(4, seed=3, split=None)
    forms = {
        "paths": lambda: [str(folder / f"{index}.png") for index in range(4)],
        "pil": lambda: [scenes[index]["image"] for index in range(4)],
        "items": lambda: [{"image": scenes[index]["image"], "label": 0} for index in range(4)],
        "dataset": lambda: scenes,
        "generator": lambda: (scenes[index] for index in range(4)),
        "datasets": lambda: _dataset([str(folder / f"{index}.png") for index in range(4)]),
    }
    batches, collected = read(forms[form](), load_image_processor(), batch_size=3)
    assert [len(batch["pixel_values"]) for batch in collected] == [3, 1]
    assert batches.total == (None if form == "generator" else 4)
    expected = load_image_processor()(images=[scenes[i]["image"] for i in range(4)], return_tensors="pt")
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in collected]), expected["pixel_values"])


def _dataset(paths):
    import datasets

    return datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))


def test_a_function_from_an_image_to_a_tensor_is_a_processor():
    scenes = SceneDataset(3, seed=3, split=None)
    _, collected = read(scenes, lambda image: torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255, batch_size=2)
    assert [tuple(batch.shape) for batch in collected] == [(2, 3, 80, 80), (1, 3, 80, 80)]


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, image):
        return torch.tensor(np.asarray(image)).permute(2, 0, 1) * self.factor


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ("facebook/dinov2-base", r"from_pretrained\('facebook/dinov2-base'\)"),
        ({"size": 224}, r"found \{'size': 224\} \(dict\)"),
        ((load_image_processor, 1), "tuple"),
        (Scaled, "the class Scaled: make one"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda path, processor: read([path], processor),
        lambda path, processor: ProcessedDataset([{"image": path}], processor),
        lambda path, processor: attention_map(load_vit(), path, image_processor=processor),
    ],
    ids=["batches", "data set", "map"],
)
def test_what_cannot_process_an_image_is_refused_before_one_is_read(use, processor, message, tmp_path):
    with pytest.raises(ValueError, match=f"image_processor must be .*{message}"):
        use(tmp_path / "not_there.png", processor)


def test_functions_of_one_class_are_told_apart_by_what_they_make():
    assert settings_of(Scaled(0.5)) == settings_of(Scaled(0.5)) != settings_of(Scaled(0.25))
    assert settings_of(load_image_processor()) == load_image_processor().to_dict()
    assert settings_of(lambda image: image.nothing) == "<lambda>"


def test_random_functions_are_told_apart_by_what_they_make_of_the_same_seeds():
    """A training transform, say; the run's own random numbers are those that it would have had."""
    state = torch.get_rng_state(), random.getstate()[1], np.random.get_state()[1].copy()
    for draw in (torch.rand, lambda _: torch.tensor(random.random()), lambda _: torch.tensor(np.random.random())):
        first, second = (lambda image, by=by, draw=draw: draw(3).sum() * by + torch.ones(3, 8, 8) for by in (1, 2))
        assert settings_of(first) == settings_of(first) != settings_of(second)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()[1]
    assert (state[2] == np.random.get_state()[1]).all()
    own = np.random.default_rng()
    with pytest.raises(ValueError, match="random ones cannot be stored"):
        settings_of(lambda image: torch.ones(3, 8, 8) * own.random())


@pytest.mark.parametrize("made", [np.ones((1, 3, 8, 8)), [np.ones((3, 8, 8))], None], ids=["array", "list", "nothing"])
def test_what_makes_no_tensors_has_the_name_of_its_class_in_a_store(made):
    def as_transformers(images, return_tensors=None):
        return {"other": 1} if made is None else {"pixel_values": made}

    assert settings_of(as_transformers) == "as_transformers"


def test_a_function_that_makes_an_array_is_named():
    with pytest.raises(ImageFileError, match=r"<lambda> fails on .*it makes ndarray, and a tensor"):
        process_image(lambda image: np.asarray(image), Image.new("RGB", (8, 8)), "x.png")


def test_ready_batches_keep_their_size_and_lose_what_the_tower_does_not_take():
    images = torch.rand(5, 3, 8, 8)
    _, collected = read([images[:2], images[2:]])
    assert [len(batch) for batch in collected] == [2, 3]
    batches, collected = read(images, batch_size=2)
    assert (batches.total, [len(batch) for batch in collected]) == (5, [2, 2, 1])
    _, collected = read([{"pixel_values": images, "labels": torch.zeros(5)}], dtype=torch.bfloat16)
    assert list(collected[0]) == ["pixel_values"]
    assert collected[0]["pixel_values"].dtype == torch.bfloat16
    _, collected = read([{"pixel_values": images}], module=Positional())
    assert torch.equal(collected[0], images)
    _, collected = read([(images, torch.zeros(5))], max_images=3)
    assert torch.equal(collected[0], images[:3])


def test_a_slice_of_a_batch_takes_what_there_is_one_of_for_each_image():
    pixels = torch.rand(5, 3, 8, 8)
    assert torch.equal(slice_batch(pixels, slice(1, 3)), pixels[1:3])
    batch = {"pixel_values": pixels, "shape": torch.tensor([8, 8]), "scale": torch.tensor(2.0), "name": "five"}
    part = slice_batch(batch, slice(3, None))
    assert torch.equal(part["pixel_values"], pixels[3:])
    assert all(part[key] is batch[key] for key in ("shape", "scale", "name"))
    assert batch_length(part) == 2
    assert batch_length(slice_batch(batch, slice(0))) == 0


def test_max_images_stops_early():
    batches, collected = read(SceneDataset(9, split=None), load_image_processor(), batch_size=4, max_images=6)
    assert (batches.total, [len(batch["pixel_values"]) for batch in collected]) == (6, [4, 2])


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "no images"),
        (7, {}, "found int"),
        ("nowhere", {}, "neither a folder nor a file"),
        ([Image.new("RGB", (8, 8))], {}, "image_processor="),
        (torch.rand(3, 8, 8), {}, r"\(M, 3, H, W\)"),
        (torch.rand(1, 3, 8, 8), {"batch_size": 0}, "batch_size must be at least 1"),
        ([{"input_ids": torch.zeros(1, 3)}], {}, "takes"),
        ([(Image.new("RGB", (8, 8)), 1)], {}, "item 0 of the images is a tuple of Image, int; give"),
        ([np.zeros((8, 8, 3), np.uint8)], {}, r"a ndarray \(8, 8, 3\) and no image: give PIL.Image.fromarray"),
        ([{"image": torch.zeros(3, 8, 8)}], {}, r"a Tensor \(3, 8, 8\) and no image: .*with_format"),
        ([{"img": Image.new("RGB", (8, 8)), "label": 1}], {}, "a dict of img, label without the key 'image'"),
        (b"JPEG", {}, "of type int and no image: give a path"),
        ([(torch.rand(3, 8, 8), 1)], {}, "one by one, each with its label .*DataLoader"),
        ([{"pixel_values": torch.rand(3, 8, 8), "labels": 1}], {}, "one by one, each with its label .*DataLoader"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), {}, r"must be floats, .* torch.uint8 \(1, 3, 8, 8\)"),
        ([{"pixel_values": torch.zeros(1, 3, 8, 8, dtype=torch.int64)}], {}, "must be floats"),
    ],
)
def test_what_is_wrong_is_said(images, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        read(images, None if "image_processor" in message else load_image_processor(), **options)


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip-vision"])
@pytest.mark.parametrize("given", ["generator", "TensorDataset"])
def test_images_one_by_one_are_told_from_batches(name: str, given: str) -> None:
    pixels = make_inputs(name)["pixel_values"]
    images = TensorDataset(pixels) if given == "TensorDataset" else (image for image in pixels)
    with pytest.raises(ValueError, match=r"takes no batch \(3, 32, 32\) .*one by one, give .*DataLoader"):
        get_features(build(name), images, progress=False)


def test_an_empty_folder_and_images_of_several_sizes(tmp_path):
    with pytest.raises(ValueError, match="holds no files"):
        list_images(tmp_path)
    sizes = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]
    with pytest.raises(ValueError, match="batch_size=1"):
        read(sizes, lambda image: torch.tensor(np.asarray(image)).permute(2, 0, 1))
