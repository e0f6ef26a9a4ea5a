"""What an image may be given as, and words for what is none, whatever it holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Number
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import RegisterAdapterError

__all__ = ["check_ready", "image_of", "iterate", "no_image", "no_items", "telling_images"]


def no_image(source: Any) -> str | None:
    """What a source is, and what to give in its place; ``None`` if an image can be read from one of its kind.

    Args:
        source: As for :func:`register_adapter.data.load_image`.
    """
    if source is None or isinstance(source, str | os.PathLike | bytes | Image.Image):
        return None
    kind = type(source).__name__
    if isinstance(source, Mapping):
        if "path" in source or "bytes" in source:
            return None
        return f"a {kind} of {_listed(source)} without the key 'image' (rename_column() of a datasets.Dataset gives it)"
    if isinstance(source, np.ndarray | torch.Tensor):
        return (
            f"a {kind} {tuple(source.shape)} and no image: give PIL.Image.fromarray(array), with_format(None) of a "
            "datasets.Dataset, or processed images as a tensor (B, 3, H, W)"
        )
    if isinstance(source, list | tuple):
        return f"a {kind} of {_listed(map(_kind, source))}; give an image, or {{'image': image, 'label': number}}"
    return f"of type {kind} and no image: give a path, the file's bytes, a PIL image, or {{'image': image}}"


def image_of(item: Any) -> Any:
    """The image of an item of a data set; an item that is no dictionary, or has no image, is one itself."""
    return item["image"] if isinstance(item, dict) and "image" in item else item


def iterate(images: Any) -> Iterator[Any]:
    """Images, or items, one after the other.

    Raises:
        ValueError: There is only one thing, and no series of them.
    """
    if isinstance(images, Mapping) or not (isinstance(images, Iterable) or hasattr(images, "__getitem__")):
        raise ValueError(f"images must be a folder, image files, images or batches, found {type(images).__name__}")
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        # A map-style data set need not end by itself.
        return (images[index] for index in range(len(images)))
    return iter(images)


def no_items(item: Any) -> str | None:
    """What an item of a labelled data set is, if it has no keys; ``None`` if it has."""
    if isinstance(item, Mapping):
        return None
    of = f" of {_listed(map(_kind, item))}" if isinstance(item, list | tuple) else ""
    return f"{type(item).__name__}{of}"


def check_ready(batch: Any, labels: Any) -> None:
    """Refuse what is no ready batch, though it holds tensors.

    Args:
        batch: A tensor, or tensors by name.
        labels: What came with it, or ``None``.

    Raises:
        ValueError: It is one image with its label, or the pixel values are whole numbers, which no image processor
            has scaled.
    """
    pixels = batch.get("pixel_values") if isinstance(batch, Mapping) else batch
    if not isinstance(pixels, torch.Tensor):
        return
    found = f"{pixels.dtype} {tuple(pixels.shape)}"
    if isinstance(labels, Number) or (isinstance(labels, str) and isinstance(batch, torch.Tensor)):
        raise ValueError(
            f"images come one by one, each with its label (found {found} and {labels!r}), where batches are needed: "
            "give torch.utils.data.DataLoader(images, batch_size=32)"
        )
    if not pixels.is_floating_point():
        raise ValueError(
            f"pixel values of a batch must be floats, as an image processor makes them, and are {found}; give the "
            "images themselves (PIL images, files), or what the processor makes of them"
        )


@contextmanager
def telling_images(batch: Any) -> Iterator[None]:
    """Around a forward pass: where it fails since the batch is one image, say so. Spectrograms have three axes too.

    Args:
        batch: A tensor, or tensors by name.

    Raises:
        ValueError: The pass fails, and the batch has as many axes as an image.
    """
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        pixels = batch.get("pixel_values") if isinstance(batch, Mapping) else batch
        if isinstance(error, RegisterAdapterError) or not isinstance(pixels, torch.Tensor) or pixels.ndim != 3:
            raise
        raise ValueError(
            f"the model takes no batch {tuple(pixels.shape)} ({error!s:.200}); if images come one by one, give "
            "torch.utils.data.DataLoader(images, batch_size=32)"
        ) from error


def _kind(value: Any) -> str:
    return type(value).__name__


def _listed(values: Any) -> str:
    names = [str(value) for value in values]
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "") or "nothing"
