"""Images that would take too much memory or never end: refused by name, from their header, one image at a time."""

from __future__ import annotations

import io
import os
import struct
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor

from register_adapter.data import (
    ImageBatches,
    ImageFileError,
    ProcessedDataset,
    check_image,
    images,
    list_images,
    load_image,
    load_image_processor,
    read_image_folder,
)
from register_adapter.data.datasets import skip_bad

# Pillow warns of what is refused here; from twice that size on it refuses itself.
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
CPU = torch.device("cpu")


class Tower(nn.Module):
    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> torch.Tensor:
        return pixel_values


def read(source: Any, processor: Any, **options: Any) -> tuple[ImageBatches, list[Any]]:
    batches = ImageBatches(source, processor, **options)
    return batches, list(batches.on(CPU, torch.float32, Tower()))


def small(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image.resize((8, 8)))).permute(2, 0, 1) / 255


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four good images."""
    for index in range(4):
        values = np.random.default_rng(index).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / f"{index}.png")
    return tmp_path


# Sizes


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((9460, 9460), "MAX_IMAGE_PIXELS"),
        ((13_000, 13_000), "MAX_IMAGE_PIXELS"),
        ((60_000, 60_000), "pixels"),  # here Pillow itself refuses
        ((1, 20_000), "more than 100 times"),
        ((65_000, 1), "more than 100 times"),
    ],
)
@pytest.mark.parametrize("decode", [True, False])
def test_sizes_are_refused_by_the_header(size: tuple[int, int], said: str, decode: bool) -> None:
    assert said in str(check_image(png_header(*size), decode))


def test_the_limit_is_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(Image.new("RGB", (100, 100)))
    assert check_image(whole) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    assert "100 × 100 pixels are more than 9999" in str(check_image(whole))
    assert "are more than 9999" in str(check_image(Image.new("RGB", (100, 100))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert check_image(whole) is None


def test_sides_of_one_to_a_hundred_are_read() -> None:
    assert load_image(encoded(Image.new("L", (1, 100)))).size == (1, 100)


def test_thin_images_are_skipped_and_the_others_read(folder: Path) -> None:
    Image.new("RGB", (1, 20_000)).save(folder / "thin.png")
    batches, made = read(folder, CLIPImageProcessor())
    assert made[0]["pixel_values"].shape == (4, 3, 224, 224)
    assert [line.partition(": ")[0] for line in batches.skipped] == [str(folder / "thin.png")]
    with pytest.raises(ImageFileError, match=r"thin\.png"):
        read(folder, CLIPImageProcessor(), strict=True)


def variants() -> dict[str, Image.Image]:
    values = np.random.default_rng(0).integers(0, 255, (23, 17, 4), np.uint8)
    colour = Image.fromarray(values, "RGBA")
    palette = colour.convert("RGB").quantize(16)
    palette.info["transparency"] = 3
    return {
        "RGBA": colour,
        "LA": colour.convert("LA"),
        "P with transparency": palette,
        "PA": colour.convert("RGB").quantize(16).convert("PA"),
        "I;16": Image.fromarray(values.astype(np.uint16)[..., 0] * 257),
        "I": Image.fromarray(values.astype(np.int32)[..., 1] * 200),
        "F": Image.fromarray((values[..., 2] / 255).astype(np.float32)),
    }


@pytest.mark.parametrize("name", variants())
def test_bands_of_rows_give_what_the_whole_image_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.asarray(images.to_rgb(variants()[name]))
    monkeypatch.setattr(images, "_BAND", 17 * 5)
    banded = images.to_rgb(variants()[name])
    assert banded.mode == "RGB"
    assert np.array_equal(np.asarray(banded), whole)


def test_a_value_that_is_not_finite_is_found_in_any_band(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.full((20, 4), 0.5, np.float32)
    values[9, 2] = np.nan
    monkeypatch.setattr(images, "_BAND", 8)
    with pytest.raises(ValueError, match="float values from nan"):
        images.to_rgb(Image.fromarray(values))


# One image at a time


class Counting:
    """A processor that counts how many decoded images are alive when it is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive = self.most = 0
        load = images.to_rgb

        def counted(image: Image.Image) -> Image.Image:
            made = load(image)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(made, self.gone)
            return made

        monkeypatch.setattr(images, "to_rgb", counted)

    def gone(self) -> None:
        self.alive -= 1

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return small(image)


@pytest.mark.parametrize("form", ["files", "open images"])
def test_one_image_is_held_at_its_full_size(folder: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [*list_images(folder)] * 3
    opened = [Image.open(file) for file in files]
    counting = Counting(monkeypatch)
    _, made = read(files if form == "files" else opened, counting, batch_size=12, num_workers=1)
    assert made[0].shape == (12, 3, 8, 8)
    assert counting.most == 1
    assert all(image.tile for image in opened)  # the caller's images were not decoded either


def test_open_images_are_read_as_their_files_and_drafts_as_they_are(folder: Path) -> None:
    Image.open(folder / "0.png").resize((320, 240)).save(folder / "large.jpg")
    opened, draft = Image.open(folder / "large.jpg"), Image.open(folder / "large.jpg")
    assert np.array_equal(np.asarray(load_image(opened)), np.asarray(Image.open(folder / "large.jpg")))
    draft.draft("RGB", (80, 60))
    assert load_image(draft).size == (80, 60)
    gone = Image.open(folder / "1.png")
    (folder / "1.png").unlink()
    assert load_image(gone).size == (30, 20)


@pytest.mark.parametrize("processor", [load_image_processor("register-adapter://clean"), CLIPImageProcessor()])
def test_a_batch_is_what_the_processor_makes_of_all_images(folder: Path, processor: Any) -> None:
    _, made = read(folder, processor)
    whole = processor(images=[load_image(file) for file in list_images(folder)], return_tensors="pt")
    assert torch.equal(made[0]["pixel_values"], whole["pixel_values"])


class Padding:
    """Pads all images of a call to the largest, as processors of several transformers models do."""

    do_pad = True

    def preprocess(self) -> None: ...

    def __call__(self, images: Any, return_tensors: str) -> dict[str, Any]:
        listed = images if isinstance(images, list) else [images]
        height, width = max(image.height for image in listed), max(image.width for image in listed)
        pixels = torch.zeros(len(listed), 3, height, width)
        for row, image in enumerate(listed):
            pixels[row, :, : image.height, : image.width] = 1
        return {"pixel_values": pixels, "sizes": [image.size for image in listed]}


def test_a_processor_that_pads_sees_the_whole_batch(folder: Path) -> None:
    Image.new("RGB", (40, 10)).save(folder / "wide.png")
    _, made = read(folder, Padding())
    assert made[0]["pixel_values"].shape == (5, 3, 20, 40)
    assert made[0]["pixel_values"][4].sum() == 3 * 10 * 40


# Processors that fail


def fails_on_red(image: Image.Image) -> torch.Tensor:
    if image.getpixel((0, 0)) == (255, 0, 0):
        raise RuntimeError("no red\nplease")
    return small(image)


def test_an_image_that_the_processor_fails_on_is_named_and_skipped(folder: Path) -> None:
    Image.new("RGB", (9, 9), "red").save(folder / "red.png")
    batches, made = read(folder, fails_on_red, batch_size=2)
    assert [len(batch) for batch in made] == [2, 2]
    [line] = batches.skipped
    assert line == f"{folder / 'red.png'}: fails_on_red fails on 9 × 9 pixels (RuntimeError: no red)"
    with pytest.raises(ImageFileError, match=r"red\.png: fails_on_red"):
        read(folder, fails_on_red, strict=True)


def test_a_processor_that_fails_on_everything_is_said_early() -> None:
    red = iter([Image.new("RGB", (9, 9), "red")] * 1000)
    with pytest.raises(ValueError, match=r"the image processor fails on the first images.*no red"):
        read(red, fails_on_red, batch_size=4)
    assert len(list(red)) > 900


def test_training_names_the_image_that_the_processor_fails_on(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9), "red").save(tmp_path / name / "0.png")
    with pytest.raises(ImageFileError, match=r"0\.png: fails_on_red"):
        ProcessedDataset(read_image_folder(tmp_path), fails_on_red)[0]


# Files that never end


@pytest.fixture
def special(folder: Path) -> Path:
    """Among the images a pipe, and a link to a device."""
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    return folder


def test_pipes_and_devices_among_images_are_named(special: Path) -> None:
    batches, made = read(special, small)
    assert len(made[0]) == 4
    assert [Path(line.partition(": ")[0]).name for line in batches.skipped] == ["pipe.png", "zero.png"]
    assert all("not a regular file" in line for line in batches.skipped)


def test_pipes_in_a_training_folder_are_named(special: Path) -> None:
    (special / "a").mkdir()
    (special / "b").mkdir()
    for path in list(special.glob("*.png")):
        path.rename(special / "a" / path.name)
    kept, lines = skip_bad(read_image_folder(special), progress=False)
    assert len(kept) == 4
    assert len(lines) == 2
