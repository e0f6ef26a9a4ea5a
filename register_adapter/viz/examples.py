"""Images with their maps under one model or several, and the attention map of one image in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..data.images import image_name
from ..features.layout import each_outside, tower_of
from ..features.subjects import Subjects, keeping_adapters, looking_at, named_subjects
from .colours import principal_colours
from .images import ImageSource, Size, prepare_image
from .maps import ImageMaps, read_image_maps

__all__ = ["Example", "attention_map", "read_examples"]


@dataclass(frozen=True)
class Example:
    """One image and what each model makes of it.

    Attributes:
        name: What to call the image.
        image: ``(H, W, 3)`` uint8, what the first model saw of it.
        maps: From a model's name to its maps, in the order of the models.
    """

    name: str
    image: npt.NDArray[np.uint8]
    maps: dict[str, ImageMaps]


@keeping_adapters
def read_examples(
    models: Subjects,
    images: Sequence[ImageSource] | torch.Tensor,
    *,
    image_processor: Any = None,
    block: int = -1,
    size: Size | None = None,
    antialias: bool = True,
    names: Sequence[str] | None = None,
) -> list[Example]:
    """Read norm maps, attention maps, colours and registers' maps of a few images under one model or several.

    Images go through one by one, so they may differ in size. Every model is left as it was.

    Args:
        models: One model, or several by name: ``{"base": model, ...}``. One adapter of a PEFT model is the pair
            ``(model, "adapter's name")``, the model with its adapters disabled ``(model, None)``; a single PEFT model
            with registers stands for its base and each of its register adapters.
        images: Paths, PIL images or tensors ``(3, H, W)``, or one tensor ``(B, 3, H, W)`` of normalised pixel values.
        image_processor: Image processor of transformers or torchvision transform; ``None`` takes each model's own.
            Tensors need none.
        block: Index of the block whose attention and principal components are read, -1 for the last.
        size: Pixels of the shorter side, or ``(height, width)``; ``None`` leaves sizes to the processor. Sides are
            cropped to a multiple of the patch size.
        antialias: Interpolate position embeddings with antialiasing.
        names: One name per image; its file's name by default.

    Returns:
        One entry per image.

    Raises:
        ValueError: There is no model, no image, no such block or adapter, or there are not as many names as
            images.
        ImageInputError: An image cannot be given to a model.
        ImageFileError: A file is not an image.
        UnsupportedModelError: Places of a model's patches are not known.
    """
    sources: list[ImageSource] = list(each_outside(images))
    if not sources:
        raise ValueError("no images to look at: images is empty")
    titles = list(names) if names is not None else [_name(source, place) for place, source in enumerate(sources, 1)]
    if len(titles) != len(sources):
        raise ValueError(f"{len(titles)} names for {len(sources)} images")
    shown: list[npt.NDArray[np.uint8]] = []
    maps_of: dict[str, list[ImageMaps]] = {}
    for name, subject in named_subjects(models).items():
        with looking_at(subject) as model:
            tower = tower_of(model)[0]
            prepared = [prepare_image(model, tower, source, image_processor, size) for source in sources]
            maps_of[name] = [read_image_maps(model, image, block, antialias) for image in prepared]
        shown = shown or [image.shown for image in prepared]
    first: list[ImageMaps] | None = None
    for name, maps in maps_of.items():
        maps_of[name] = _with_colours(maps, first)
        first = first or maps_of[name]
    return [
        Example(title, image, {name: maps[place] for name, maps in maps_of.items()})
        for place, (title, image) in enumerate(zip(titles, shown, strict=True))
    ]


def _name(source: ImageSource, place: int) -> str:
    path = image_name(source) if not isinstance(source, torch.Tensor | bytes) else ""
    return Path(path).name if path and not path.endswith("without a name") else f"image {place}"


def _with_colours(maps: list[ImageMaps], first: list[ImageMaps] | None) -> list[ImageMaps]:
    grids = [image.norms.shape[1:] for image in maps]
    same = first is not None and all(
        a.colours is not None and a.colours.shape[:2] == grid for a, grid in zip(first, grids, strict=True)
    )
    like = [image.colours for image in first if image.colours is not None] if first is not None and same else None
    colours = principal_colours([image.features for image in maps], grids, like)
    return [replace(image, colours=colour) for image, colour in zip(maps, colours, strict=True)]


def attention_map(
    model: nn.Module,
    image: ImageSource,
    *,
    image_processor: Any = None,
    block: int = -1,
    head: int | str | None = None,
    size: Size | None = None,
    antialias: bool = True,
) -> npt.NDArray[np.float32]:
    """Attention of CLS to the patches of one image, with any supported model, with or without registers.

    Where there is no CLS, it is the attention that a patch receives, the mean over all queries.

    Args:
        model: Model of transformers, timm, OpenCLIP, torchvision or DINOv2's own code; active adapters take part.
        image: A path, a PIL image, or normalised pixel values ``(3, H, W)`` or ``(1, 3, H, W)``.
        image_processor: Image processor of transformers or torchvision transform; ``None`` takes the model's own. A
            tensor needs none.
        block: Index of the block, -1 for the last.
        head: Index of a head; ``None`` for the mean over heads, ``"all"`` for all of them.
        size: Pixels of the shorter side (the sides' ratio is kept), or ``(height, width)``, for models that interpolate
            their position embeddings. ``None`` leaves the size to the processor. Sides that are not multiples of the
            patch size are cropped to one, as a patch embedding does.
        antialias: Interpolate position embeddings with antialiasing; without it a smaller image than the model was
            trained on gives stripes.

    Returns:
        ``(h, w)`` float32 over the grid of patches, ``(H, h, w)`` with ``head="all"``. The rest of the attention, up to
        1, goes to CLS and registers.

    Raises:
        ValueError: There is no such block or head.
        ImageInputError: The image cannot be given to this model.
        ImageFileError: The file is not an image.
        UnsupportedModelError: The model has no vision tower, or places of its patches are not known.
        RegisterAdapterError: Hidden states or attention maps are not finite (NaN or infinite).

    Example:
        >>> attention_map(model, "cat.jpg", size=518)
    """
    with looking_at(model):
        prepared = prepare_image(model, tower_of(model)[0], image, image_processor, size)
        heads = read_image_maps(model, prepared, block, antialias).attention
    if head is None:
        mean: npt.NDArray[np.float32] = heads.mean(0)
        return mean
    if head == "all":
        return heads
    if isinstance(head, str) or not -len(heads) <= head < len(heads):
        raise ValueError(f"head={head!r}, expected None, 'all', or an index of one of {len(heads)} heads")
    chosen: npt.NDArray[np.float32] = heads[head]
    return chosen
