"""What discovery is computed from: images at their own resolution, and features of their patches from any block."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ...data.batches import list_images
from ...data.images import check_pixels, load_image
from ...data.processors import check_processor, find_image_processor, normalisation_of, source_of
from ...errors import RegisterAdapterError, UnsupportedModelError
from ...features.grid import patch_tokens, watch_patches
from ...features.layout import adapters_stay, find_layout, tower_of
from ...features.passes import keep_layer, place_of
from ...features.positions import antialiased_positions
from ...features.projections import PROJECTIONS, keep_projection
from ...towers.tower import Tower
from ...utils.arguments import check_whole
from .boxes import DiscoveredObject

__all__ = [
    "FEATURES",
    "Features",
    "PatchReader",
    "Preparation",
    "Prepared",
    "Size",
    "Wanted",
    "each_image",
    "fails_on",
    "tower_inputs",
]

Features = Literal["keys", "queries", "values", "tokens"]
#: What patches can be compared by.
FEATURES: tuple[Features, ...] = ("keys", "queries", "values", "tokens")
#: Pixels of the shorter side, or ``(height, width)``; ``None``: the image's own.
Size = int | tuple[int, int] | None


class Wanted(NamedTuple):
    """Features of one kind from one block."""

    features: Features
    block: int


@dataclass(frozen=True)
class Prepared:
    """One image for the tower.

    Attributes:
        pixels: ``(3, H, W)`` float32, normalised; below and to the right zeros up to multiples of the patch size.
        size: ``(H, W)`` of the image in it.
        original: ``(H, W)`` of the image as it came.
    """

    pixels: torch.Tensor
    size: tuple[int, int]
    original: tuple[int, int]

    def in_original(self, item: DiscoveredObject) -> DiscoveredObject:
        """What was found in ``pixels``, in pixels of the image as it came."""
        if self.size == self.original:
            return item
        down, across = (there / here for there, here in zip(self.original, self.size, strict=True))
        box = item.box[0] * across, item.box[1] * down, item.box[2] * across, item.box[3] * down
        return replace(item, box=box, patch_size=(item.patch_size[0] * down, item.patch_size[1] * across))


class Preparation:
    """Makes any image what a tower takes, as LOST's code does: normalised, not resized, padded with zeros.

    Args:
        model: Whose image processor says how pixels are normalised.
        tower: Its vision tower.
        image_processor: Of transformers, or a torchvision transform with a ``Normalize``; ``None`` looks up the model's
            own, as soon as an image needs one.
        size: See :data:`Size`.

    Raises:
        UnsupportedModelError: The side of a patch is not known.
        ValueError: ``size`` is below 1, or of more pixels than an image may have.
    """

    def __init__(self, model: nn.Module, tower: Tower, image_processor: Any = None, size: Size = None) -> None:
        if not isinstance(tower.patch_size, int):
            raise UnsupportedModelError(
                f"the side of a patch of {type(tower.module).__name__} is not known, so images cannot be padded to it"
            )
        check_processor(image_processor)
        if size is not None:
            _check_size(size)
        self.patch_size: int = tower.patch_size
        self._source, self._processor, self._size = source_of(model, tower), image_processor, size
        self._scaling: tuple[float, torch.Tensor, torch.Tensor] | None = None

    def __call__(self, source: Any) -> Prepared:
        """Prepare a path, a file's bytes, a PIL image, an array ``(H, W, 3)`` uint8, or normalised ``(3, H, W)``.

        Raises:
            ImageFileError: A file is not an image.
            ValueError: A tensor has another shape, or the processor does not say how it normalises.
        """
        if isinstance(source, Mapping) and "image" in source:
            source = source["image"]
        if isinstance(source, torch.Tensor):
            return self._padded(*self._resized(source))
        image = load_image(Image.fromarray(source) if isinstance(source, np.ndarray) else source)
        original = image.height, image.width
        if (size := self._sides(*original)) != original:
            image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        factor, mean, std = self._normalisation()
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        return self._padded((pixels * factor - mean) / std, original)

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        if self._size is None or isinstance(self._size, tuple):
            return self._size or (height, width)
        scale = self._size / min(height, width)
        sides = round(height * scale), round(width * scale)
        _check_size(sides)
        return sides

    def _resized(self, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.is_floating_point():
            raise ValueError(
                f"a tensor must be normalised pixel values (3, H, W), got {pixels.dtype} {tuple(pixels.shape)}"
            )
        original = pixels.shape[1], pixels.shape[2]
        if (size := self._sides(*original)) != original:
            pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
        return pixels, original

    def _padded(self, pixels: torch.Tensor, original: tuple[int, int]) -> Prepared:
        height, width = pixels.shape[1:]
        padded = F.pad(pixels, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return Prepared(padded, (height, width), original)

    @property
    def normalisation(self) -> list[Any]:
        """Factor of pixel values, their mean and their standard deviation, as numbers."""
        factor, mean, std = self._normalisation()
        return [factor, mean.flatten().tolist(), std.flatten().tolist()]

    def _normalisation(self) -> tuple[float, torch.Tensor, torch.Tensor]:
        if self._scaling is None:
            processor = self._processor if self._processor is not None else find_image_processor(self._source)
            known = normalisation_of(processor)
            if known is None and getattr(processor, "do_normalize", None) is not False:
                raise ValueError(
                    f"{getattr(processor, '__name__', type(processor).__name__)} does not say by which mean and "
                    "standard deviation it normalises; give an image processor of transformers, a torchvision "
                    "transform with a Normalize, or images as normalised tensors (3, H, W)"
                )
            mean, std = known or ([0.0], [1.0])
            rescales = getattr(processor, "do_rescale", True)
            factor = float(getattr(processor, "rescale_factor", None) or 1 / 255) if rescales else 1.0
            self._scaling = factor, torch.tensor(mean).reshape(-1, 1, 1), torch.tensor(std).reshape(-1, 1, 1)
        return self._scaling


def _check_size(size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    try:
        check_pixels(width, height)
    except ValueError as error:
        raise ValueError(f"size={size} is too large: {error}") from error
    if min(height, width) < 1:
        raise ValueError(f"size={size} must be at least 1")


class PatchReader:
    """Reads features of patches from one forward pass; registers and CLS are left out.

    Args:
        model: With or without registers, in the mode and with the adapters that it is to be read in.
        wanted: Kinds of features and blocks; a block may count from the end.
        antialias: Interpolate position embeddings with antialiasing.

    Raises:
        ValueError: There is no such kind, or no such block.
        UnsupportedModelError: The model has no vision tower.
    """

    def __init__(self, model: nn.Module, wanted: Sequence[Wanted], antialias: bool = True) -> None:
        self.tower, self._registers = tower_of(model)
        self._antialias = antialias
        blocks = len(self.tower.part("blocks"))
        for what, block in wanted:
            if what not in FEATURES:
                raise ValueError(f"features={what!r}, expected one of {', '.join(FEATURES)}")
            check_whole("block", block)
            if not -blocks <= block < blocks:
                raise ValueError(f"block={block}, and {type(self.tower.module).__name__} has {blocks} blocks")
        self._wanted = {pair: Wanted(pair.features, pair.block % blocks) for pair in wanted}
        self._last = blocks - 1

    @torch.no_grad()
    def read(self, pixels: torch.Tensor, grid: tuple[int, int]) -> dict[Wanted, torch.Tensor]:
        """Features ``(B, h * w, D)`` of ``(B, 3, H, W)`` normalised pixel values, on the model's device.

        Args:
            pixels: The images, of one size.
            grid: ``(h, w)``, how many patches they have.

        Raises:
            ValueError: The model fails on images of this size.
            UnsupportedModelError: Where the patches lie is not known, or a block has no layer of a known name.
        """
        device, dtype = place_of(self.tower)
        pixels = pixels.to(device, dtype)
        with ExitStack() as stack:
            stack.enter_context(adapters_stay(self._registers))
            kept: dict[Wanted, list[torch.Tensor]] = {}
            for what, block in self._wanted.values():
                if what == "tokens":
                    context: Any = keep_layer(self.tower, block + 1)
                else:
                    context = keep_projection(self.tower, block, PROJECTIONS[PROJECTIONS.index(what)])
                kept[Wanted(what, block)] = stack.enter_context(context)
            patches = stack.enter_context(watch_patches(self.tower))
            if self._antialias:
                stack.enter_context(antialiased_positions(self.tower))
            inputs = tower_inputs(self.tower, pixels, grid)
            self._run(pixels, inputs)
            layouts = {pair: find_layout(self.tower, self._registers, pair.block + 1) for pair in kept}
        read: dict[Wanted, torch.Tensor] = {}
        for asked, pair in self._wanted.items():
            features, seen = patch_tokens(self.tower, kept[pair][0], layouts[pair], patches, inputs)
            if (seen or features.shape[1]) != (grid if seen else grid[0] * grid[1]):
                raise UnsupportedModelError(
                    f"{type(self.tower.module).__name__} makes {seen or features.shape[1]} patches of images of "
                    f"{tuple(pixels.shape[2:])} px, and {grid} were expected"
                )
            normed = pair.features == "tokens" and pair.block == self._last
            read[asked] = (self.tower.normed(features) if normed else features).float()
        return read

    def _run(self, pixels: torch.Tensor, inputs: Any) -> None:
        try:
            self.tower.run(inputs)
        except (RegisterAdapterError, torch.OutOfMemoryError):
            raise
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise fails_on(self.tower, f"pixel values {tuple(pixels.shape)}", error) from error


def fails_on(tower: Tower, what: str, error: Exception) -> ValueError:
    """What to say where a tower fails on images of a size that was asked for."""
    return ValueError(
        f"{type(tower.module).__name__} fails on {what}: {error}. A model that does not interpolate its position "
        "embeddings takes images of one size only: give size=(height, width)"
    )


def tower_inputs(tower: Tower, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor | dict[str, torch.Tensor]:
    """What the tower is called with: pixel values, in order where it shuffles them, or patches where it takes those."""
    names = inspect.signature(tower.module.forward).parameters
    count = grid[0] * grid[1]
    if "spatial_shapes" in names:  # SigLIP 2's kind: rows of pixels with their colours last
        side = pixels.shape[2] // grid[0]
        patches = pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1)
        return {
            "pixel_values": patches.reshape(len(pixels), count, -1),
            "pixel_attention_mask": torch.ones(len(pixels), count, dtype=torch.long, device=pixels.device),
            "spatial_shapes": torch.tensor([grid] * len(pixels), device=pixels.device),
        }
    if "noise" in names:
        return {"pixel_values": pixels, "noise": torch.arange(count).to(pixels).expand(len(pixels), -1)}
    return pixels


def each_image(images: Any) -> Iterator[Any]:
    """Images one by one: of a folder, of a list, of a data set, of a batch ``(B, 3, H, W)``, or the one that is given.

    Raises:
        ValueError: There are none, or ``images`` is nothing of the kind.
    """
    if isinstance(images, str | Path) and Path(images).is_dir():
        images = list_images(images)
    elif isinstance(images, str | bytes | Path | Image.Image) or _is_single(images):
        images = [images]
    if isinstance(images, Mapping) or not (hasattr(images, "__iter__") or hasattr(images, "__getitem__")):
        raise ValueError(f"images must be a folder, image files, images or tensors, found {type(images).__name__}")
    number = -1
    for number, image in enumerate(images):  # noqa: B007 - whether there was any
        yield image
    if number < 0:
        raise ValueError("there are no images")


def _is_single(images: Any) -> bool:
    return isinstance(images, torch.Tensor | np.ndarray) and images.ndim == 3
