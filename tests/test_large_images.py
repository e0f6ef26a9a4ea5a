"""Images of many pixels, and batches that are padded: memory is that of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, DetrImageProcessor, ViltImageProcessor, ViTImageProcessor

from register_adapter.data import processing
from register_adapter.data.batches import ImageBatches
from register_adapter.data.processing import process_image, reduced

SIZES = ((90, 60), (50, 120), (77, 77))


class Seen:
    """A processor that remembers the sizes of the images that it was given."""

    def __init__(self, processor: Any) -> None:
        self.image_processor, self.sizes = processor, []

    def __call__(self, images: Any, return_tensors: str | None = None, **options: Any) -> Any:
        listed = images if isinstance(images, list) else [images]
        self.sizes.append([image.size for image in listed if isinstance(image, Image.Image)])
        return self.image_processor(images=images, return_tensors=return_tensors, **options)


def gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.linspace(0, 255, height), np.linspace(0, 255, width)
    values = np.stack(np.broadcast_arrays(rows[:, None], columns[None], 128.0), -1)
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize(
    "processor",
    [ViTImageProcessor(size={"height": 32, "width": 32}), CLIPImageProcessor(size={"shortest_edge": 32})],
    ids=["fixed", "shortest"],
)
def test_a_large_image_is_reduced_before_it_is_processed(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image = gradient(640, 400)
    whole = process_image(processor, image, "whole")["pixel_values"]
    monkeypatch.setattr(processing, "LARGE", 640 * 400 - 1)
    seen = Seen(processor)
    small = process_image(seen, image, "reduced")["pixel_values"]
    assert seen.sizes == [[(107, 67)]]
    torch.testing.assert_close(small, whole, atol=0.05, rtol=0)
    monkeypatch.setattr(processing, "LARGE", 640 * 400)
    process_image(seen, image, "as it is")
    assert seen.sizes[1] == [(640, 400)]


@pytest.mark.parametrize(
    "processor",
    [lambda image: image, ViTImageProcessor(do_resize=False), ViTImageProcessor()],
    ids=["own", "no", "big"],
)
def test_where_it_is_not_known_or_not_less_an_image_stays(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processing, "LARGE", 1)
    image = gradient(400, 300)
    assert reduced(processor, image) is image


def test_an_image_of_81_megapixels_takes_a_fraction_of_its_size() -> None:
    image = Image.new("RGB", (9000, 9000))
    small = reduced(ViTImageProcessor(), image)
    assert 448 <= min(small.size) < 900


@pytest.mark.parametrize(
    "processor",
    [
        DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}),
        ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=8),
    ],
    ids=["detr", "vilt"],
)
def test_a_padded_batch_is_made_of_one_image_at_a_time(processor: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0)
    images = [Image.fromarray(values.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    seen = Seen(processor)

    class Tower(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> None: ...

    (batch,) = ImageBatches(tmp_path, seen, batch_size=8).on(torch.device("cpu"), torch.float32, Tower())
    whole = processor(images=images, return_tensors="pt")
    assert set(batch) == set(whole)
    for key, value in batch.items():
        torch.testing.assert_close(value, whole[key], atol=0, rtol=0)
    assert max(map(len, seen.sizes)) == 1
