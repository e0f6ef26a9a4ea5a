"""Procedural labelled images: one or two coloured shapes on a low-information background.

The background is the point: register artifacts sit on patches that say nothing that their neighbours do not say as
well ("Vision Transformers Need Registers", arXiv 2309.16588, section 2.1), so every scene has many of them, and the
object, its mask and its box are known exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import MissingExtraError

__all__ = ["COLOURS", "LABELS", "SHAPES", "Scene", "SceneDataset", "SceneObject", "make_scene", "photographs"]

Split = Literal["train", "test"]
_Array = npt.NDArray[np.floating[Any]]


def _polygon(x: _Array, y: _Array, corners: int, inner: float) -> _Array:
    """Distance-like field of a regular star with ``corners`` tips; ``inner`` = 1 would be a circle's polygon."""
    angle = np.arctan2(x, -y)
    sector = 2 * np.pi / corners
    folded = np.abs(np.mod(angle + sector / 2, sector) - sector / 2)
    radius = np.hypot(x, y)
    px, py = radius * np.cos(folded), radius * np.sin(folded)
    # The edge runs from the tip (1, 0) to the inner corner at half a sector.
    ex, ey = inner * np.cos(sector / 2) - 1.0, inner * np.sin(sector / 2)
    field: _Array = ((px - 1.0) * -ey + py * ex) / np.hypot(ex, ey)
    return -field


# Signed fields in units of the shape's radius: negative inside. Each takes x, y of shape (H, W).
_FIELDS: dict[str, Callable[[_Array, _Array], _Array]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.8,
    "triangle": lambda x, y: _polygon(x, y, 3, 0.5),
    "star": lambda x, y: _polygon(x, y, 5, 0.42),
    "cross": lambda x, y: np.minimum(
        np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.3), np.maximum(np.abs(x) - 0.3, np.abs(y) - 0.95)
    ),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.22,
}
_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 215),
    "yellow": (235, 205, 40),
    "magenta": (200, 50, 190),
}
SHAPES: tuple[str, ...] = tuple(_FIELDS)
COLOURS: tuple[str, ...] = tuple(_COLOURS)
LABELS: tuple[str, ...] = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

# (package, file) of images that installed packages carry; the two splits share none.
_PHOTOGRAPHS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/brick.png"),
        ("skimage", "data/chelsea.png"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/grass.png"),
        ("skimage", "data/gravel.png"),
        ("skimage", "data/motorcycle_left.png"),
        ("skimage", "data/rocket.jpg"),
        ("sklearn", "datasets/images/china.jpg"),
    ),
    "test": (
        ("skimage", "data/camera.png"),
        ("skimage", "data/hubble_deep_field.jpg"),
        ("skimage", "data/retina.jpg"),
        ("sklearn", "datasets/images/flower.jpg"),
    ),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene.

    Attributes:
        label: Class index into :data:`LABELS`.
        mask: ``(H, W)`` bool, the pixels at least half covered and not hidden by another shape.
        box: ``(x0, y0, x1, y1)`` in pixels, half open, tight around ``mask``.
    """

    label: int
    mask: npt.NDArray[np.bool_]
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """An image and its ground truth.

    Attributes:
        image: ``(H, W, 3)`` uint8 RGB.
        objects: The main shape first, then at most one distractor with less than half its area.
    """

    image: npt.NDArray[np.uint8]
    objects: tuple[SceneObject, ...]

    @property
    def label(self) -> int:
        """Class index of the main shape."""
        return self.objects[0].label

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """``(H, W)`` bool mask of the main shape."""
        return self.objects[0].mask

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Box ``(x0, y0, x1, y1)`` of the main shape, half open, in pixels."""
        return self.objects[0].box

    @property
    def pil(self) -> Image.Image:
        """The image as a PIL image."""
        return Image.fromarray(self.image)


@lru_cache(maxsize=2)
def photographs(split: Split = "train") -> tuple[Image.Image, ...]:
    """The photographs that installed packages carry, as RGB PIL images; the two splits share none.

    Args:
        split: ``"train"`` or ``"test"``.

    Raises:
        MissingExtraError: scikit-image or scikit-learn is not installed.
    """
    from importlib.util import find_spec

    images = []
    for package, file in _PHOTOGRAPHS[split]:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise MissingExtraError("photographs behind the scenes", package, "testbed")
        with Image.open(Path(spec.origin).parent / file) as image:
            images.append(image.convert("RGB"))
    return tuple(images)


def _background(rng: np.random.Generator, size: int, photos: Sequence[Image.Image]) -> _Array:
    """``(size, size, 3)`` float32 in 0…255: a smooth gradient, or a crop of a photograph (half the time)."""
    if photos and rng.random() < 0.5:
        photo = photos[int(rng.integers(len(photos)))]
        side = int(rng.uniform(0.15, 0.9) * min(photo.size))
        left = int(rng.integers(photo.width - side + 1))
        top = int(rng.integers(photo.height - side + 1))
        box = (left, top, left + side, top + side)
        return np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR, box=box), np.float32)
    grid = np.linspace(-1, 1, size, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(angle) * grid[None] + np.sin(angle) * grid[:, None]) / np.sqrt(2)
    bend = rng.uniform(-0.4, 0.4) * (grid[None] ** 2 + grid[:, None] ** 2 - 0.7)
    mixed = np.clip(0.5 + 0.5 * (ramp + bend), 0, 1)[..., None]
    # Muted colours, so that the background is never mistaken for a shape.
    first, second = (rng.uniform(40, 215) + rng.uniform(-30, 30, 3) for _ in range(2))
    blended: _Array = (mixed * first + (1 - mixed) * second).astype(np.float32)
    return blended


def _coverage(
    rng: np.random.Generator, shape: str, size: int, centre: npt.NDArray[np.float64], radius: float
) -> _Array:
    """``(size, size)`` float32 in 0…1: how much of each pixel the shape covers."""
    pixel = np.arange(size, dtype=np.float32) + 0.5
    dx, dy = (pixel[None] - centre[0]) / radius, (pixel[:, None] - centre[1]) / radius
    turn = rng.uniform(-0.3, 0.3)
    x, y = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    covered: _Array = np.clip(0.5 - _FIELDS[shape](x, y) * radius, 0, 1).astype(np.float32)
    return covered


def _box(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def make_scene(seed: int | Sequence[int], size: int = 80, photos: Sequence[Image.Image] = ()) -> Scene:
    """Draw one scene; the same arguments always give the same image.

    Args:
        seed: Seed of this image, an integer or a sequence of them (as for ``numpy.random.default_rng``).
        size: Side in pixels.
        photos: Photographs to cut backgrounds from; with none every background is a gradient.

    Raises:
        ValueError: ``size`` is below 16, where shapes cannot be told apart.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels for the shapes to be visible, got {size}")
    rng = np.random.default_rng(seed)
    canvas = _background(rng, size, photos)
    radius = rng.uniform(0.17, 0.32) * size
    centre = rng.uniform(radius, size - radius, 2)
    label = int(rng.integers(len(LABELS)))
    drawn: list[tuple[int, _Array]] = []
    if rng.random() < 0.5:  # a distractor, drawn first so that the main shape is never hidden
        small = radius * rng.uniform(0.4, 0.6)
        spots = rng.uniform(small, size - small, (16, 2))
        clear = np.hypot(*(spots - centre).T) > radius + small
        if clear.any():
            other = int(rng.integers(len(LABELS) - 1))
            other += other >= label
            drawn.append((other, _coverage(rng, SHAPES[other % len(SHAPES)], size, spots[clear][0], small)))
    drawn.append((label, _coverage(rng, SHAPES[label % len(SHAPES)], size, centre, radius)))

    for index, alpha in drawn:
        colour = np.array(_COLOURS[COLOURS[index // len(SHAPES)]], np.float32) + rng.uniform(-20, 20, 3)
        shade = 1 + rng.uniform(-0.1, 0.1) * np.linspace(-1, 1, size, dtype=np.float32)[:, None, None]
        canvas += alpha[..., None] * (colour * shade - canvas)
    canvas += rng.normal(0, 2.0, canvas.shape)
    main = drawn[-1][1] >= 0.5
    objects = [SceneObject(label, main, _box(main))]
    for index, alpha in drawn[:-1]:
        mask = (alpha >= 0.5) & ~main
        if mask.any():
            objects.append(SceneObject(index, mask, _box(mask)))
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), tuple(objects))


class SceneDataset:
    """A map-style data set of scenes: item ``i`` depends on ``seed`` and ``i`` alone.

    Args:
        length: Number of scenes.
        size: Side in pixels.
        seed: Seed of the whole set; sets with different seeds share no scene.
        split: Which photographs lie behind the shapes, ``"train"`` or ``"test"``; ``None`` for gradients only.

    Raises:
        MissingExtraError: ``split`` is given and the packages with the photographs are not installed.
    """

    def __init__(self, length: int, size: int = 80, seed: int = 0, split: Split | None = "train") -> None:
        self.length, self.size, self.seed, self.split = length, size, seed, split
        self._photos = photographs(split) if split else ()

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """Scene number ``index`` with its mask and boxes.

        Raises:
            IndexError: ``index`` is outside the set.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of a set of {self.length}")
        return make_scene((self.seed, index), self.size, self._photos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``{"image": PIL image, "label": int}``, the columns of a ``datasets`` image folder."""
        scene = self.scene(index)
        return {"image": scene.pil, "label": scene.label}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(self.length))

    def write(self, folder: str | Path) -> Path:
        """Write the set as an image folder, one sub-folder per class, and return its path."""
        for index in range(self.length):
            scene = self.scene(index)
            target = Path(folder) / LABELS[scene.label].replace(" ", "_")
            target.mkdir(parents=True, exist_ok=True)
            scene.pil.save(target / f"{index:06d}.png")
        return Path(folder)
