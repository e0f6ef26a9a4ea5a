"""Image processors applied to one image at a time, and their results put together to the batch that they would make."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from ..utils.text import printable
from .images import ImageFileError

__all__ = ["Batch", "Processing", "process_image"]

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
    try:
        if _is_processor(processor):
            return dict(processor(images=image, return_tensors="pt"))
        pixels: torch.Tensor = processor(image)
        return pixels[None]
    except Exception as error:
        said = printable(error).partition("\\n")[0] or "no message"
        size = f"{image.width} × {image.height} pixels"
        raise ImageFileError(
            f"{name}: {_called(processor)} fails on {size} ({type(error).__name__}: {said})"
        ) from error


class Processing:
    """How images become batches: each is processed before the next is decoded, so that one is held at its full size.

    Args:
        processor: Of transformers, or a function from a PIL image to ``(3, H, W)``.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        inner = getattr(processor, "image_processor", processor)
        #: Whether it makes images of one size by looking at all of them.
        self.pads = _is_processor(processor) and bool(getattr(inner, "do_pad", False))

    def single(self, image: Image.Image, name: str) -> Batch:
        """See :func:`process_image`."""
        return process_image(self.processor, image, name)

    def joined(self, singles: Sequence[Batch], read_again: Callable[[], list[Image.Image]]) -> Batch:
        """One batch of several images.

        Args:
            singles: What :meth:`single` made of each.
            read_again: Gives the images, for a processor that pads all images of a batch to the largest.

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
        return dict(self.processor(images=read_again(), return_tensors="pt"))

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
