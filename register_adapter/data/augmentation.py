"""Random changes to training images that depend on nothing but seed, epoch and the image's number."""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches
from random import Random

from PIL import Image, ImageEnhance

__all__ = ["AUGMENTATIONS", "Augmentation"]

#: Least share of an image's area, and largest ratio of its sides to the image's, that a crop has.
_AREA, _ASPECT = 0.5, 4 / 3
#: How far brightness, contrast and saturation go up or down.
_JITTER = 0.3


def _flip(image: Image.Image, random: Random) -> Image.Image:
    """Left to right, every second time."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def _crop(image: Image.Image, random: Random) -> Image.Image:
    """A part of at least half of the area, somewhere, a little wider or narrower than the image."""
    area = random.uniform(_AREA, 1.0)
    stretch = math.exp(random.uniform(-math.log(_ASPECT), math.log(_ASPECT)) / 2)
    share = math.sqrt(area)
    width = max(1, min(image.width, round(image.width * share * stretch)))
    height = max(1, min(image.height, round(image.height * share / stretch)))
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def _colour(image: Image.Image, random: Random) -> Image.Image:
    """Brightness, contrast and saturation, each up to 30 % up or down."""
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(random.uniform(1 - _JITTER, 1 + _JITTER))
    return image


#: Name to what it does to an image.
AUGMENTATIONS: dict[str, Callable[[Image.Image, Random], Image.Image]] = {
    "crop": _crop,
    "flip": _flip,
    "colour": _colour,
}


class Augmentation:
    """Changes an image at random; the same one in the same epoch of the same seed always in the same way.

    Args:
        names: Names from :data:`AUGMENTATIONS`, with commas between them; they are applied in that order.
        seed: Seed, default 0.

    Raises:
        ValueError: A name is unknown, or there is none.
    """

    def __init__(self, names: str, seed: int = 0) -> None:
        self.names = [name.strip() for name in names.split(",")]
        for name in self.names:
            if name not in AUGMENTATIONS:
                near = get_close_matches(name, AUGMENTATIONS, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"augmentation must be none, or some of {', '.join(AUGMENTATIONS)} with commas between them, got "
                    f"{names!r}{hint}"
                )
        self.seed = seed

    def __str__(self) -> str:
        return ",".join(self.names)

    def __call__(self, image: Image.Image, epoch: int, index: int) -> Image.Image:
        """The image as item ``index`` of a data set has it in an epoch."""
        random = Random(f"{self.seed} {epoch} {index}")
        for name in self.names:
            image = AUGMENTATIONS[name](image, random)
        return image
