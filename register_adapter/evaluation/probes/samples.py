"""Drawing a few tokens per image out of a stream of forward passes: normal and outlying patches, CLS, registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from ...artifacts.rules.threshold import Threshold
from ...errors import UnsupportedModelError
from ...features.grid import PatchGrid, watch_patches
from ...features.layout import TokenLayout, find_layout
from ...features.passes import Batch, keep_layer
from ...towers.tower import Tower
from ...tuner.layer import RegisterLayer

__all__ = ["ImageTokens", "TokenSampler", "TokenSamples"]

_Floats = npt.NDArray[np.float32]
_Places = dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class ImageTokens:
    """What is kept of one image.

    Attributes:
        image: Number of the image in the stream.
        label: Its class, ``None`` without labels.
        prefix: ``(prefix, D)`` tokens before the patches: CLS and the like, registers.
        patches: By kind, ``"normal"`` and ``"outlier"``, ``(k, D)`` tokens drawn at random.
        places: Their numbers in the grid, row by row.
        pixels: ``(k, C)`` their pixels; empty without a grid.
    """

    image: int
    label: int | None
    prefix: _Floats
    patches: dict[str, _Floats]
    places: _Places
    pixels: dict[str, _Floats]


@dataclass
class _Reservoir:
    """A uniform sample of at most ``size`` items of a stream (Vitter's algorithm R)."""

    size: int
    seen: int = 0
    items: list[ImageTokens] = field(default_factory=list)

    def slot(self, rng: np.random.Generator) -> int | None:
        """Where the next item of the stream goes, ``None``: nowhere."""
        self.seen += 1
        if self.seen <= self.size:  # not the length: items of one batch are put after all of them have their slots
            return self.seen - 1
        place = int(rng.integers(self.seen))
        return place if place < self.size else None

    def put(self, slot: int, item: ImageTokens) -> None:
        """Keep an item at its slot."""
        self.items[slot : slot + 1] = [item]


@dataclass
class TokenSamples:
    """The drawn tokens of a stream.

    Attributes:
        layout: Order of the tokens before the patches.
        grid: ``(h, w)`` patches, ``None`` if their places were not asked for.
        num_images: Number of images in the stream.
        num_patches: Number of their patch tokens.
        num_outliers: Number of outliers among them.
        num_images_with_both: Number of images that have normal patches and outliers.
        with_both: A sample of the latter, with as many normal patches as outliers of each.
        plain: A sample of the other images: normal patches alone.
    """

    layout: TokenLayout
    grid: tuple[int, int] | None = None
    num_images: int = 0
    num_patches: int = 0
    num_outliers: int = 0
    num_images_with_both: int = 0
    with_both: list[ImageTokens] = field(default_factory=list)
    plain: list[ImageTokens] = field(default_factory=list)


class TokenSampler:
    """Keeps a few tokens of each image and nothing else; a consumer of a pass over images.

    The draw depends on the seed and the image's number in the stream alone, not on the size of the batches.

    Args:
        tower: The tower.
        registers: Its register layer, if there is one.
        threshold: Which patch tokens are outliers; ``None`` for none.
        layer: Index into ``hidden_states``, counted from the front.
        places: Keep places and pixels of the patches.
        tokens_per_image: Patches of each kind that are kept of an image, at most.
        max_samples: Images with outliers that are kept, and as many without; a uniform sample if there are more.
        seed: Seed of the draw.
    """

    def __init__(
        self,
        tower: Tower,
        registers: RegisterLayer | None,
        threshold: Threshold | None,
        layer: int,
        places: bool,
        tokens_per_image: int,
        max_samples: int,
        seed: int,
    ) -> None:
        self._tower, self._threshold, self._layer, self._places = tower, threshold, layer, places
        self._tokens_per_image, self._seed = tokens_per_image, seed
        self._layout = find_layout(tower, registers, layer)
        self._both, self._plain = _Reservoir(max_samples), _Reservoir(max_samples)
        self._samples = TokenSamples(self._layout)
        self._kept: list[torch.Tensor] = []
        self._grid: PatchGrid | None = None

    @contextmanager
    def attach(self) -> Iterator[None]:
        """Hooks that keep the states of the layer, and what the patches are embedded from."""
        with keep_layer(self._tower, self._layer) as self._kept, watch_patches(self._tower) as self._grid:
            yield

    def take(self, batch: Batch) -> None:
        """Draw tokens of the images that went through the tower last.

        Raises:
            UnsupportedModelError: Places are asked for and not known.
            ValueError: The images differ in size from those before.
        """
        hidden, samples = self._kept[0], self._samples
        patches = hidden[:, self._layout.first_patch :]
        pixels = None
        if self._places:
            assert self._grid is not None
            patches = patches[:, : self._settle_grid(self._grid, batch, patches.shape[1])]
            pixels = self._grid.pixels()
        outlying = np.zeros(patches.shape[:2], bool)
        if self._threshold is not None:
            outlying = self._threshold.mask(patches).cpu().numpy()
        for row, reservoir, slot, drawn in self._draw(outlying):
            reservoir.put(slot, _image_tokens(batch, row, samples.num_images, hidden, self._layout, drawn, pixels))
        samples.num_images += batch.size
        samples.num_patches += outlying.size
        samples.num_outliers += int(outlying.sum())

    def samples(self) -> TokenSamples:
        """What was drawn."""
        return replace(
            self._samples,
            num_images_with_both=self._both.seen,
            with_both=self._both.items,
            plain=self._plain.items,
        )

    def _draw(self, outlying: npt.NDArray[np.bool_]) -> list[tuple[int, _Reservoir, int, _Places]]:
        """The rows of a batch whose tokens are kept: in which reservoir, at which slot, and which patches."""
        chosen = []
        for row, mask in enumerate(outlying):
            rng = np.random.default_rng((self._seed, self._samples.num_images + row))
            outliers, normal = np.flatnonzero(mask), np.flatnonzero(~mask)
            if not len(normal):
                continue
            count = min(len(outliers), len(normal), self._tokens_per_image)
            reservoir = self._both if count else self._plain
            if (slot := reservoir.slot(rng)) is None:
                continue
            drawn = {"outlier": rng.permutation(outliers)[:count]} if count else {}
            drawn["normal"] = rng.permutation(normal)[: count or self._tokens_per_image]
            chosen.append((row, reservoir, slot, drawn))
        return chosen

    def _settle_grid(self, grid: PatchGrid, batch: Batch, count: int) -> int:
        """Number of patches, of ``count`` tokens behind CLS and registers."""
        try:
            shape = grid.shape(batch.size, count, batch.inputs)
        except UnsupportedModelError as error:
            hint = 'Only classification can be probed then: probe_tokens(..., tasks=("classification",))'
            raise UnsupportedModelError(f"{error}. {hint}") from error
        known = self._samples.grid
        if known not in (None, shape):
            raise ValueError(
                f"images of several sizes: {known} patches, then {shape}; a probe of places needs one grid"
            )
        self._samples.grid = shape
        return shape[0] * shape[1]


def _image_tokens(
    batch: Batch,
    row: int,
    start: int,
    hidden: torch.Tensor,
    layout: TokenLayout,
    drawn: _Places,
    pixels: torch.Tensor | None,
) -> ImageTokens:
    def array(values: torch.Tensor) -> _Floats:
        copied: _Floats = values.float().cpu().numpy().copy()  # a view would keep the whole batch
        return copied

    def rows(values: torch.Tensor, offset: int = 0) -> dict[str, _Floats]:
        return {kind: array(values[row, torch.as_tensor(at + offset)]) for kind, at in drawn.items()}

    return ImageTokens(
        image=start + row,
        label=None if batch.labels is None else int(batch.labels[row]),
        prefix=array(hidden[row, : layout.first_patch]),
        patches=rows(hidden, layout.first_patch),
        places=drawn,
        pixels=rows(pixels) if pixels is not None else {},
    )
