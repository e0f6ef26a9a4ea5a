"""From an image as a user has it to what a vision tower is given, and what of it the tower sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ..data.images import check_pixels, load_image
from ..data.processors import check_processor, load_image_processor, normalisation_of, source_of
from ..errors import MissingExtraError, RegisterAdapterError
from ..towers.tower import Tower
from ..tuner.hooks.call_state import outside_of_readings

__all__ = ["ImageInputError", "ImageSource", "PreparedImage", "Size", "prepare_image"]

#: A path, a file's bytes, a PIL image, or pixel values ``(3, H, W)`` or ``(1, 3, H, W)``.
ImageSource = str | Path | bytes | Image.Image | torch.Tensor
#: Pixels of the shorter side, with the sides' ratio kept, or ``(height, width)``.
Size = int | tuple[int, int]

# Steps of a torchvision transform that change an image's geometry, by the names of their classes.
_GEOMETRY = ("Resize", "Crop", "Pad")


class ImageInputError(RegisterAdapterError, ValueError):
    """An image cannot be given to this model."""


@dataclass(frozen=True)
class PreparedImage:
    """One image, ready for a tower.

    Attributes:
        inputs: Pixel values ``(1, 3, H, W)``, sides multiples of the patch size; or the keywords of a tower that takes
            patches ``(1, N, P * P * 3)``.
        shown: ``(H, W, 3)`` uint8, what the tower sees, for eyes.
        grid: ``(h, w)``, the patches in it, where the processor has cut them; otherwise ``None``.
    """

    inputs: torch.Tensor | dict[str, torch.Tensor]
    shown: npt.NDArray[np.uint8]
    grid: tuple[int, int] | None


@outside_of_readings()
def prepare_image(
    model: nn.Module, tower: Tower, source: ImageSource, image_processor: Any = None, size: Size | None = None
) -> PreparedImage:
    """Make an image what a tower takes; sides are cropped to a multiple of the patch size.

    The crop keeps the upper left, as DINO's own images of attention do; a patch embedding drops the same pixels.

    Args:
        model: The model, for its name on the Hub, where ``image_processor`` is not given.
        tower: Its vision tower.
        source: See :data:`ImageSource`. A tensor is taken as normalised already.
        image_processor: Image processor of transformers, or a torchvision transform that ends in a tensor. ``None``
            takes the model's own: of its name (transformers), its data config (timm), or its preprocessing (OpenCLIP).
        size: See :data:`Size`; then the processor neither resizes nor crops. ``None`` leaves both to the processor,
            and a tensor as it is.

    Raises:
        ImageInputError: A tensor of another shape, a size that is none or too large, no processor, one without a
            3-channel result, or sides shorter than a patch.
        ImageFileError: The file is not an image.
    """
    if isinstance(source, torch.Tensor):
        pixels = source if source.ndim == 4 else source[None]
        if pixels.ndim != 4 or pixels.shape[:2] != (1, 3) or not pixels.is_floating_point():
            raise ImageInputError(
                f"pixel values must be floats (3, H, W) or (1, 3, H, W), got {source.dtype} {tuple(source.shape)}"
            )
        if size is not None:
            pixels = F.interpolate(pixels, _sides(size, *pixels.shape[2:]), mode="bicubic", antialias=True)
        return _cropped(tower, pixels, None)
    check_processor(image_processor)
    image = load_image(source)
    processor = image_processor if image_processor is not None else _own_processor(model, tower)
    if size is not None:
        height, width = _sides(size, image.height, image.width)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    inputs = _process(processor, image, resize=size is None)
    if "spatial_shapes" in inputs:
        return _patches(tower, image, inputs)
    pixels = inputs["pixel_values"]
    if pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
        raise ImageInputError(
            f"{type(processor).__name__} makes pixel_values {tuple(pixels.shape)} of one image, and (1, 3, H, W) was "
            "expected; give the image as a tensor"
        )
    return _cropped(tower, pixels, normalisation_of(processor))


def _sides(size: Size, height: int, width: int) -> tuple[int, int]:
    pair = isinstance(size, tuple | list)
    given = list(size) if isinstance(size, tuple | list) else [size]
    if len(given) != 1 + pair or any(isinstance(side, bool) or not isinstance(side, int) for side in given):
        raise ImageInputError(f"size must be pixels of the shorter side, or (height, width), got {size!r:.100}")
    if min(given) < 1:
        raise ImageInputError(f"size={size} must be at least 1")
    if pair:
        height, width = given
    else:
        scale = given[0] / min(height, width)
        height, width = round(height * scale), round(width * scale)
    try:
        check_pixels(width, height)
    except ValueError as error:
        raise ImageInputError(f"size={size} is too large: {error}") from error
    return height, width


def _cropped(tower: Tower, pixels: torch.Tensor, statistics: tuple[Any, Any] | None) -> PreparedImage:
    if isinstance(patch := tower.patch_size, int):
        height, width = pixels.shape[2] // patch * patch, pixels.shape[3] // patch * patch
        if not height or not width:
            raise ImageInputError(f"an image of {pixels.shape[2]} × {pixels.shape[3]} px holds no patch of {patch} px")
        pixels = pixels[:, :, :height, :width]
    return PreparedImage(pixels, _for_eyes(pixels[0].float().cpu(), statistics), None)


def _patches(tower: Tower, image: Image.Image, inputs: dict[str, torch.Tensor]) -> PreparedImage:
    """Towers of SigLIP 2's kind: the processor has cut the image into patches, at a size of its own."""
    height, width = (int(side) for side in inputs["spatial_shapes"][0])
    patch = tower.patch_size or 16
    return PreparedImage(inputs, np.asarray(image.resize((width * patch, height * patch))), (height, width))


def _for_eyes(pixels: torch.Tensor, statistics: tuple[Any, Any] | None) -> npt.NDArray[np.uint8]:
    """``(H, W, 3)`` from normalised ``(3, H, W)``; stretched to its own range where the statistics are not known."""
    if statistics is not None:
        mean, std = (torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in statistics)
        pixels = pixels * std + mean
    if statistics is None or pixels.min() < -0.1 or pixels.max() > 1.1:
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(1e-12)
    shown: npt.NDArray[np.uint8] = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return shown


# Processors


def _process(processor: Any, image: Image.Image, resize: bool) -> dict[str, torch.Tensor]:
    """What a processor makes of one image, as keywords."""
    if hasattr(processor, "preprocess"):  # transformers
        steps = ("do_resize", "do_center_crop", "do_pad")
        off = {} if resize else {name: False for name in steps if getattr(processor, name, None) is not None}
        # In transformers 4 a few processors still stretch to the size they know.
        return dict(processor(images=[image], return_tensors="pt", **off))
    if not resize:
        for step in getattr(processor, "transforms", [processor]):
            if not any(word in getattr(step, "__name__", type(step).__name__) for word in _GEOMETRY):
                image = step(image)
        made: Any = image
    else:
        made = processor(image)
    if not isinstance(made, torch.Tensor):
        raise ImageInputError(f"image_processor must make a tensor of an image, it made a {type(made).__name__}")
    return {"pixel_values": made[None] if made.ndim == 3 else made}


def _own_processor(model: nn.Module, tower: Tower) -> Any:
    source = source_of(model, tower)
    if source:
        try:
            return load_image_processor(source)
        except ValueError as error:
            raise ImageInputError(
                f"no image processor was found in {source!r}, which the model is from; give image_processor=, or "
                "the image as a tensor"
            ) from error
    package = type(tower.module).__module__.partition(".")[0]
    if package not in _MAKERS:
        raise ImageInputError(
            f"{type(tower.module).__name__} does not say how its images are prepared; give image_processor=, an "
            "image processor of transformers or a torchvision transform, or give the image as a tensor"
        )
    return _MAKERS[package](tower.module)


def _timm(module: Any) -> Any:
    data: Any = _library("timm.data", "timm", "timm")
    size = getattr(module.patch_embed, "img_size", None)  # as built, which the model's config need not know
    options = {"input_size": (3, *size)} if size is not None else {}
    return data.create_transform(**data.resolve_data_config(options, model=module), is_training=False)


def _open_clip(module: Any) -> Any:
    library: Any = _library("open_clip", "open_clip_torch", "open-clip")
    mean, std = getattr(module, "image_mean", None), getattr(module, "image_std", None)  # None: OpenAI's
    return library.image_transform(module.image_size, is_train=False, mean=mean, std=std)


def _library(name: str, package: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"images for {extra} models", package, extra) from error


#: Package of a tower -> its evaluation transform, from what the module itself says.
_MAKERS: Mapping[str, Callable[[Any], Any]] = {"timm": _timm, "open_clip": _open_clip}
