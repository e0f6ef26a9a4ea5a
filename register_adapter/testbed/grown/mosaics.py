"""Mosaics: images whose task makes a vision transformer grow high-norm patch tokens by itself.

An image is a grid of tiles, one a patch. Every tile has *contents*: a few low-frequency fields of colour. Some tiles
carry an icon as well; a few framed ones *ask* for the contents of the tile with the same icon; the rest is background
without icons, of any contrast. The target of a tile is its own contents, and the contents that it asks for; for a tile
that does not ask the second half is exactly zero, so its heads need somewhere to look that adds nothing.

Half of the contents' variance is shared by the whole image, so that neither uniform attention nor attention to
oneself adds nothing, and background tiles have contents of their own, which a large norm hides behind the LayerNorm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from PIL import Image
from torch import nn

from ..scenes import photographs

__all__ = [
    "IMAGE_MEAN",
    "IMAGE_STD",
    "TILE_KINDS",
    "MosaicDataset",
    "MosaicTask",
    "Mosaics",
    "normalised",
    "summary_of",
]

#: Normalisation of the pixels, as the image processor of the grown models has it.
IMAGE_MEAN, IMAGE_STD = 0.5, 0.35
#: What a tile is, by its number in :attr:`Mosaics.kinds`.
TILE_KINDS = ("contents", "icon", "asking", "background", "padding")
_CONTENTS, _ICON, _ASKING, _BACKGROUND, _PADDING = range(len(TILE_KINDS))
#: What background tiles show, and which tiles say the summary; see :class:`MosaicTask`.
Backdrop: TypeAlias = Literal["pale", "photographs"]
SummaryAt: TypeAlias = Literal["every", "asking", "background", "idle", "pooled"]
#: Images that are drawn at once, from one seed.
_CHUNK = 64


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Pixel values ``(..., 3, H, W)`` float32 of pixels in uint8, as the image processor gives them."""
    return (images.float() / 255 - IMAGE_MEAN) / IMAGE_STD


class Mosaics(NamedTuple):
    """A batch of images with ``P`` tiles each, and what is asked.

    Attributes:
        images: Pixels ``(B, 3, H, W)``, uint8.
        targets: What is to be said of each tile ``(B, P, 2 * contents + summary)``, float32: its own contents, those
            that it asks for, and the image's summary.
        weights: Weights of the tiles in the loss ``(B, P)``, float32.
        kinds: What each tile is ``(B, P)``, int64, an index into :data:`TILE_KINDS`.
        asked: Which tile an asking one asks for ``(B, P)``, int64; -1 elsewhere.
    """

    images: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    kinds: torch.Tensor
    asked: torch.Tensor

    @property
    def pixel_values(self) -> torch.Tensor:
        """Normalised pixels ``(B, 3, H, W)``, float32, as the image processor gives them."""
        return normalised(self.images)

    @property
    def is_background(self) -> torch.Tensor:
        """Tiles without icon or frame that nobody asks for ``(B, P)``, bool."""
        return self.kinds >= _BACKGROUND


@dataclass(frozen=True)
class MosaicTask:
    """How images are drawn and what is asked.

    Attributes:
        grid: Tiles on a side.
        patch_size: Pixels on a side of a tile.
        icons: Tiles that may be asked for; as many other icons are on tiles that are not.
        asking: Tiles that ask.
        contents: Numbers in a tile's contents, a multiple of 3 up to 27.
        shared: Share of the contents' variance that is common to an image.
        background: Fewest and most background tiles.
        contrast: Least and largest contrast of a background tile.
        background_weight: Weight of a background tile in the loss; other tiles have 1.
        noise: Standard deviation of the pixels' noise, in normalised values.
        backdrop: What background tiles show: pale contents, or pieces of a photograph.
        summary: Numbers to be said about the whole image: a fixed non-linear function of the mean contents. 0 for
            none.
        summary_at: The tiles that must say it: every one; those that ask, or the background, while all others say
            zero; ``"idle"``: those that ask for nothing, in place of the zeros of the contents that they ask for, so
            that what looks at nothing has to look at the summary; ``"pooled"``: no tile, but a query behind the last
            block, :class:`.recipes.PooledModel`.
        padding: Rows of constant grey tiles at the top.
    """

    grid: int = 10
    patch_size: int = 8
    icons: int = 8
    asking: int = 12
    contents: int = 24
    shared: float = 0.5
    background: tuple[int, int] = (25, 45)
    contrast: tuple[float, float] = (0.3, 1.0)
    background_weight: float = 0.2
    noise: float = 0.01
    backdrop: Backdrop = "pale"
    summary: int = 0
    summary_at: SummaryAt = "every"
    padding: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            ValueError: A word that is none of those that are known, or a summary that has no place.
        """
        for name, known in (("backdrop", get_args(Backdrop)), ("summary_at", get_args(SummaryAt))):
            if (given := getattr(self, name)) not in known:
                raise ValueError(f"{name}={given!r:.100} is unknown; there are {', '.join(map(repr, known))}")
        least, most = {"pooled": (1, None), "idle": (0, self.contents)}.get(self.summary_at, (0, None))
        if self.summary < least or (most is not None and self.summary > most):
            room = f"at least {least}" if most is None else f"{least} to {most}, the numbers of a tile's contents"
            raise ValueError(f"summary={self.summary} with summary_at={self.summary_at!r}: it takes {room}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MosaicTask:
        """The task of ``dataclasses.asdict``, also after JSON has made lists of its pairs."""
        pairs = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **pairs})

    @property
    def num_patches(self) -> int:
        """Tiles of an image, ``P``."""
        return self.grid**2

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.grid * self.patch_size

    @property
    def num_targets(self) -> int:
        """Numbers in a tile's target."""
        return 2 * self.contents + (0 if self.summary_at == "idle" else self.summary)

    def draw(self, count: int, seed: int) -> Mosaics:
        """``count`` images; the same arguments always give the same images.

        Args:
            count: How many.
            seed: Seed of this batch.
        """
        rng = torch.Generator().manual_seed(seed)
        patterns, tiles, images = _patterns(self), self.num_patches, torch.arange(count)[:, None]
        order = torch.rand(count, tiles, generator=rng)
        order[:, : self.padding * self.grid] += 1  # padding comes last
        rank = order.argsort(1).argsort(1)
        kinds = self._kinds(rank, rng)
        background = (kinds == _BACKGROUND)[..., None]
        common = torch.randn(count, 1, self.contents, generator=rng)
        own = torch.randn(count, tiles, self.contents, generator=rng)
        contents = math.sqrt(self.shared) * common + math.sqrt(1 - self.shared) * own
        low, high = self.contrast
        contents = (
            torch.where(background, (low + (high - low) * torch.rand(count, tiles, 1, generator=rng)), 1) * contents
        )
        holders = rank.argsort(1)[:, : self.icons]  # the tile with each icon
        wanted = torch.randint(self.icons, (count, tiles), generator=rng)
        icons = torch.where(kinds == _ICON, rank, wanted).clamp(max=self.icons - 1)
        icons = torch.where(kinds == _CONTENTS, icons + self.icons, icons)
        asking = kinds == _ASKING
        asked = torch.where(asking, holders[images, wanted], -1)

        drawn = contents @ patterns.fields
        if self.backdrop == "photographs":
            pieces = self._pieces(count, rng)
            drawn = torch.where(background, pieces, drawn)
            contents = torch.where(background, pieces @ patterns.fields.T / patterns.energy, contents)
        drawn = drawn + torch.where((kinds < _BACKGROUND)[..., None], patterns.icons[icons], 0)
        drawn = drawn + torch.where(asking[..., None], patterns.frame, 0)
        drawn = drawn + self.noise * torch.randn(drawn.shape, generator=rng)
        padding = (kinds == _PADDING)[..., None]
        contents, drawn = contents.masked_fill(padding, 0), drawn.masked_fill(padding, 0)
        fetched = torch.where(asking[..., None], contents[images, asked.clamp(min=0)], 0)
        targets = [contents, fetched]
        if self.summary:
            targets = self._with_summary(contents, fetched, kinds)
        weights = torch.where(kinds >= _BACKGROUND, self.background_weight, 1.0)
        return Mosaics(self._assembled(drawn), torch.cat(targets, -1), weights, kinds, asked)

    def _with_summary(self, contents: torch.Tensor, fetched: torch.Tensor, kinds: torch.Tensor) -> list[torch.Tensor]:
        summary = summary_of(self, contents)[:, None].expand(-1, kinds.shape[1], -1)
        asking, background = (kinds == _ASKING)[..., None], (kinds >= _BACKGROUND)[..., None]
        if self.summary_at == "idle":
            default = nn.functional.pad(summary, (0, self.contents - self.summary))
            return [contents, torch.where(asking, fetched, default)]
        says = {"every": True, "asking": asking, "background": background, "pooled": False}[self.summary_at]
        return [contents, fetched, torch.where(torch.as_tensor(says), summary, 0)]

    def _kinds(self, rank: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        count, tiles = rank.shape
        fewest, most = self.background
        background = torch.randint(fewest, most + 1, (count, 1), generator=rng)
        kinds = torch.full((count, tiles), _CONTENTS)
        kinds[rank < self.icons + self.asking + background] = _BACKGROUND
        kinds[rank < self.icons + self.asking] = _ASKING
        kinds[rank < self.icons] = _ICON
        kinds[:, : self.padding * self.grid] = _PADDING
        return kinds

    def _pieces(self, count: int, rng: torch.Generator) -> torch.Tensor:
        """Tiles of photographs ``(B, P, 3 * patch_size**2)``, normalised."""
        photos, chosen = _photos(self.image_size), torch.randint(10**6, (count, 4), generator=rng)
        whole = []
        for number, top, left, turn in chosen.tolist():
            photo = photos[number % len(photos)]
            top, left = (place % (photo.shape[-1] - self.image_size + 1) for place in (top, left))
            whole.append(photo[:, top : top + self.image_size, left : left + self.image_size].rot90(turn % 4, (1, 2)))
        return self._cut((torch.stack(whole) - IMAGE_MEAN) / IMAGE_STD)

    def _cut(self, images: torch.Tensor) -> torch.Tensor:
        size, grid = self.patch_size, self.grid
        tiles = images.reshape(-1, 3, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5)
        return tiles.reshape(len(images), grid * grid, -1)

    def _assembled(self, tiles: torch.Tensor) -> torch.Tensor:
        size, grid = self.patch_size, self.grid
        images = tiles.reshape(-1, grid, grid, 3, size, size).permute(0, 3, 1, 4, 2, 5)
        images = images.reshape(len(tiles), 3, grid * size, grid * size)
        return ((images * IMAGE_STD + IMAGE_MEAN) * 255).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class _Patterns:
    """What tiles are drawn with, each ``3 * patch_size**2`` numbers: contents, icons, the frame."""

    fields: torch.Tensor
    icons: torch.Tensor
    frame: torch.Tensor
    mix: torch.Tensor
    read: torch.Tensor
    #: Squared length of a field.
    energy: float = field(default=0.0)


@cache
def _patterns(task: MosaicTask) -> _Patterns:
    """Fields are the lowest cosines of each colour; icons and frame are mirror-symmetric or square, without them."""
    size, pixels = task.patch_size, 3 * task.patch_size**2
    rng = torch.Generator().manual_seed(7)
    steps = torch.arange(size) + 0.5
    waves = torch.stack([torch.cos(math.pi * steps * f / size) * (1 if f else 0.5**0.5) for f in range(size)])
    waves = waves * math.sqrt(2 / size)
    pairs = sorted(((a, b) for a in range(3) for b in range(3)), key=lambda pair: (sum(pair), pair))
    plain = torch.stack([torch.outer(waves[a], waves[b]) for a, b in pairs[: task.contents // 3]])
    fields = torch.einsum("cd,nij->cndij", torch.eye(3), plain).reshape(task.contents, pixels)
    scale = 0.35 * math.sqrt(pixels / task.contents)

    def without_fields(images: torch.Tensor) -> torch.Tensor:
        low = torch.einsum("nij,kij,kab->nab", images, plain, plain)
        return (images - low)[:, None].expand(-1, 3, -1, -1).reshape(len(images), pixels)

    half = (torch.rand(2 * task.icons, size, size // 2, generator=rng) < 0.5).float() * 2 - 1
    frame = torch.zeros(1, size, size)
    frame[:, [0, -1]] = frame[:, :, [0, -1]] = 1.0
    return _Patterns(
        fields=fields * scale,
        icons=without_fields(torch.cat([half, half.flip(-1)], -1)) * 0.3,
        frame=without_fields(frame)[0] * 0.8,
        mix=torch.randn(task.contents, 32, generator=rng) / math.sqrt(task.contents),
        read=torch.randn(32, max(task.summary, 1), generator=rng) / 4,
        energy=scale**2,
    )


def summary_of(task: MosaicTask, contents: torch.Tensor) -> torch.Tensor:
    """The summary of images ``(..., summary)`` whose tiles have these contents ``(..., P, contents)``."""
    mean, patterns = contents.mean(-2) * math.sqrt(task.contents), _patterns(task)
    return (torch.relu(mean @ patterns.mix) @ patterns.read).tanh()


@cache
def _photos(least: int) -> tuple[torch.Tensor, ...]:
    """Square photographs ``(3, H, H)`` in 0…1, a little larger than an image."""
    side = round(2.5 * least)
    resized = [photo.resize((side, side)) for photo in photographs("train")]
    return tuple(
        torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).reshape(side, side, 3).permute(2, 0, 1) / 255
        for photo in resized
    )


class MosaicDataset:
    """A map-style data set of mosaics: item ``i`` depends on ``seed`` and ``i`` alone.

    Args:
        length: Number of images.
        task: How they are drawn.
        seed: Seed of the whole set.
    """

    def __init__(self, length: int, task: MosaicTask | None = None, seed: int = 0) -> None:
        self.length, self.task, self.seed = length, task or MosaicTask(), seed
        self._chunks: dict[int, Mosaics] = {}

    def __len__(self) -> int:
        return self.length

    def mosaic(self, index: int) -> Mosaics:
        """Image number ``index`` with what is asked, a batch of one.

        Raises:
            IndexError: ``index`` is outside the set.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"image {index} of a set of {self.length}")
        number, place = divmod(index, _CHUNK)
        if number not in self._chunks:
            self._chunks = {number: self.task.draw(_CHUNK, self.seed * 1_000_003 + number)}
        return Mosaics(*(part[place : place + 1] for part in self._chunks[number]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``{"image": PIL image}``, the column of a ``datasets`` image folder."""
        return {"image": Image.fromarray(self.mosaic(index).images[0].permute(1, 2, 0).numpy())}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(self.length))
