"""Image processors applied to one image at a time, and their results put together to the batch that they would make."""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..errors import UnsupportedModelError
from ..utils.random_states import same_random_state
from ..utils.text import printable
from .images import ImageFileError
from .processors import check_processor

__all__ = ["LARGE", "Batch", "Processing", "check_fits", "pixels_alone", "process_image", "reduced", "settings_of"]

#: Pixels of an image that is processed as it is: beyond what cameras of most phones make.
LARGE = 2**25
_SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
#: What a tower is called with: pixel values ``(B, 3, H, W)``, or its keywords.
Batch = torch.Tensor | dict[str, Any]


def process_image(processor: Any, image: Image.Image, name: str) -> Batch:
    """A batch of one image.

    Args:
        processor: Of transformers, or a function from a PIL image to ``(3, H, W)``.
        image: The image.
        name: What to call it in an error.

    Raises:
        ImageFileError: The processor failed, whatever it raised.
    """
    size = f"{image.width} × {image.height} pixels"
    try:
        image = reduced(processor, image)
        if _is_processor(processor):
            return dict(processor(images=image, return_tensors="pt"))
        pixels = processor(image)
        if not isinstance(pixels, torch.Tensor):
            raise TypeError(f"it makes {type(pixels).__name__}, and a tensor (3, H, W) is needed")
        return pixels[None]
    except Exception as error:
        said = printable(error).partition("\\n")[0] or "no message"
        raise ImageFileError(
            f"{name}: {_called(processor)} fails on {size} ({type(error).__name__}: {said})"
        ) from error


def settings_of(processor: Any) -> Any:
    """What tells a processor from another one, ready for JSON: its settings, or, of a function, what it does.

    Args:
        processor: Of transformers, or a function from a PIL image to ``(3, H, W)``, which is tried on one image: a
            torchvision transform of other steps makes other pixel values, which its class does not say. Steps that are
            random are tried from the same seeds whenever they are; the run's own random numbers stay as they are.

    Raises:
        ValueError: What it makes of one image changes in spite of the seeds.
    """
    if processor is None or isinstance(processor, type):
        return type(processor).__name__
    if hasattr(processor, "to_dict") and (settings := processor.to_dict()):
        return settings
    rows, columns = np.mgrid[:288, :352]
    pattern = np.stack([rows * 7 + columns * 3, rows ^ columns, rows * columns // 5], axis=-1).astype(np.uint8)
    made = [_digest(processor, Image.fromarray(pattern)) for _ in range(2)]
    if made[0] != made[1]:
        raise ValueError(
            f"{_called(processor)} makes other pixel values of one image each time, and random ones cannot be stored: "
            "leave the store out, or give an image processor without random steps"
        )
    return f"{_called(processor)} {made[0]}" if made[0] else _called(processor)


def _digest(processor: Any, image: Image.Image) -> str | None:
    """Shape and hash of what is made of an image from fixed seeds, ``None`` where that is no pixel values."""
    with same_random_state():
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        try:
            made = process_image(processor, image, "a test image")
        except ImageFileError:  # what it does with real ones is found out there
            return None
    pixels = made.get("pixel_values") if isinstance(made, dict) else made
    if not isinstance(pixels, torch.Tensor) or pixels.layout != torch.strided or pixels.is_meta:
        return None
    values = pixels.detach().cpu().float().contiguous().numpy()
    return f"{tuple(pixels.shape[1:])} {hashlib.sha256(values.tobytes()).hexdigest()[:32]}"


def reduced(processor: Any, image: Image.Image) -> Image.Image:
    """An image of many pixels at a fraction of its size, where the processor resizes to far less anyway.

    Processors make floating point copies of whole images: 2 GB of one with 81 million pixels. What is left has at
    least twice the sides that are asked for. Images up to :data:`LARGE` pixels are as they were.
    """
    inner = getattr(processor, "image_processor", processor)
    size = getattr(inner, "size", None)
    # A number, a dictionary, or transformers' own object with these attributes.
    values = [size, *(size.get(name) if isinstance(size, dict) else getattr(size, name, None) for name in _SIDES)]
    sides = [value for value in values if isinstance(value, int) and value > 0]
    if image.width * image.height <= LARGE or not sides or not getattr(inner, "do_resize", False):
        return image
    factor = min(image.size) // (2 * max(sides))
    return image.reduce(factor) if factor > 1 else image


def check_fits(made: Batch, module: nn.Module, processor: Any) -> None:
    """Refuse what a processor made where the model cannot take it, as far as the model's config says.

    Args:
        made: From :func:`process_image`.
        module: The model, or its vision tower.
        processor: For the message.

    Raises:
        ValueError: There are no pixel values, or they have other channels, or less than a patch.
    """
    config, takes = getattr(module, "config", None), inspect.signature(module.forward).parameters
    who = f"{_called(processor)} is not the image processor of this {type(module).__name__}:"
    pixels = made if isinstance(made, torch.Tensor) else made.get("pixel_values")
    if isinstance(made, dict) and "pixel_values" in takes and not isinstance(pixels, torch.Tensor):
        raise ValueError(f"{who} it makes {', '.join(made)}, and pixel_values are needed; save the model's own with it")
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
        return
    channels, patch = (getattr(config, name, None) for name in ("num_channels", "patch_size"))
    sides = [patch, patch] if isinstance(patch, int) else list(patch or ())[-2:]
    wrong = isinstance(channels, int) and channels != pixels.shape[1]
    small = any(isinstance(side, int) and side > got for side, got in zip(sides, pixels.shape[2:], strict=False))
    if wrong or small:
        needed = f"{channels} channels" if wrong else f"at least the {sides[0]} × {sides[1]} of a patch"
        made_of = f"{pixels.shape[1]} channels" if wrong else f"{pixels.shape[2]} × {pixels.shape[3]} pixels"
        raise ValueError(f"{who} it makes images of {made_of}, and {needed} are needed; save the model's own with it")


def pixels_alone(made: Batch, processor: Any) -> torch.Tensor:
    """The pixel values of what a processor made, for training, which calls a model with nothing else.

    Args:
        made: From :func:`process_image`.
        processor: For the message.

    Raises:
        UnsupportedModelError: They are rows of patches, as NaFlex models of SigLIP 2 and Pix2Struct take them.
    """
    pixels = made if isinstance(made, torch.Tensor) else made.get("pixel_values")
    if not isinstance(pixels, torch.Tensor) or (isinstance(made, dict) and pixels.ndim == 3):
        raise UnsupportedModelError(
            f"{_called(processor)} makes {', '.join(made)} of an image, which are rows of patches; trainings and "
            "studies give a model pixel values (3, H, W) alone, so that this one cannot be trained. audit, fit, "
            "features and eval take it"
        )
    return pixels


class Processing:
    """How images become batches: each is processed before the next is decoded, so that one is held at its full size.

    Args:
        processor: Of transformers, or a function from a PIL image to ``(3, H, W)``.

    Raises:
        ValueError: It is neither.
    """

    def __init__(self, processor: Any) -> None:
        check_processor(processor)
        self.processor = processor
        inner = getattr(processor, "image_processor", processor)
        #: Whether it makes images of one size by looking at all of them.
        self.pads = _is_processor(processor) and bool(getattr(inner, "do_pad", False))

    def single(self, image: Image.Image, name: str) -> Batch:
        """See :func:`process_image`."""
        return process_image(self.processor, image, name)

    def joined(self, singles: Sequence[Batch], read_again: Callable[[], Iterable[Image.Image]]) -> Batch:
        """One batch of several images.

        Args:
            singles: What :meth:`single` made of each.
            read_again: Gives the images, one after the other, for a processor that pads all to the largest.

        Raises:
            ValueError: The images come out with different sizes.
        """
        if len(singles) == 1:
            return singles[0]
        tensors = [single for single in singles if isinstance(single, torch.Tensor)]
        if tensors:
            return self._stacked(tensors)
        named = [single for single in singles if isinstance(single, dict)]
        try:
            return {key: self._combined([single[key] for single in named]) for key in named[0]}
        except ValueError:
            if not self.pads:
                raise
        try:
            return self._padded(read_again())
        except (TypeError, ValueError, KeyError):  # one that does not let its steps be taken apart
            return dict(self.processor(images=list(read_again()), return_tensors="pt"))

    def _padded(self, images: Iterable[Image.Image]) -> Batch:
        """A batch of images of different sizes: each is resized before the next is decoded, then all are padded."""
        options = {"return_tensors": "pt", "input_data_format": "channels_first"}
        small = [
            np.asarray(
                self.processor(
                    images=reduced(self.processor, image),
                    return_tensors="pt",
                    do_rescale=False,
                    do_normalize=False,
                    do_pad=False,
                )["pixel_values"][0]
            )
            for image in images
        ]
        return dict(self.processor(images=small, do_resize=False, **options))

    def _combined(self, values: list[Any]) -> Any:
        """What the processor would give for all images, from what it gave for each."""
        first = values[0]
        if isinstance(first, torch.Tensor) and first.ndim:
            return self._stacked(values)
        if isinstance(first, list):
            return [entry for value in values for entry in value]
        return first

    def _stacked(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        if len(shapes := {tuple(tensor.shape[1:]) for tensor in tensors}) > 1:
            raise ValueError(
                f"the images of a batch come out of {_called(self.processor)} with different sizes: {sorted(shapes)}; "
                "give a processor with a fixed size, or batch_size=1"
            )
        return torch.cat(tensors)


def _is_processor(processor: Any) -> bool:
    """Whether it is called as transformers' image processors are, whatever its class."""
    if hasattr(processor, "preprocess") or hasattr(processor, "image_processor"):
        return True
    try:
        return {"images", "return_tensors"} <= set(inspect.signature(processor).parameters)
    except (TypeError, ValueError):  # no signature
        return False


def _called(processor: Any) -> str:
    return str(getattr(processor, "__name__", type(processor).__name__))
