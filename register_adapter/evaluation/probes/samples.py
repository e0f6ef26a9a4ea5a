"""Drawing a few tokens an image out of a stream of forward passes: normal and outlying patches, CLS, registers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ...artifacts.rules.cut import Cut
from ...errors import UnsupportedModelError
from ...features.grid import PatchGrid, watch_patches
from ...features.layout import TokenLayout, find_layout
from ...features.passes import Batch, keep_layer
from ...towers.modes import evaluating
from ...towers.tower import Tower
from ...tuner.layer import RegisterLayer

__all__ = ["ImageTokens", "TokenSamples", "draw_tokens"]

_Floats = npt.NDArray[np.float32]


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
    places: dict[str, npt.NDArray[np.int64]]
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


def draw_tokens(
    tower: Tower,
    registers: RegisterLayer | None,
    batches: Iterable[Batch],
    cut: Cut | None,
    layer: int,
    places: bool,
    tokens_per_image: int,
    max_samples: int,
    seed: int,
) -> TokenSamples:
    """Run the tower over all images and keep a few tokens of each; nothing else is stored.

    The draw depends on the seed and the image's number in the stream alone, not on the size of the batches.

    Args:
        tower: The tower; it is left as it was.
        registers: Its register layer, if there is one.
        batches: The images.
        cut: Which patch tokens are outliers; ``None`` for none.
        layer: Index into ``hidden_states``, counted from the front.
        places: Keep places and pixels of the patches.
        tokens_per_image: Patches of each kind that are kept of an image, at most.
        max_samples: Images with outliers that are kept, and as many without; a uniform sample if there are more.
        seed: Seed of the draw.

    Raises:
        UnsupportedModelError: Places are asked for and not known.
        ValueError: Pictures of several sizes come in the stream.
    """
    layout = find_layout(tower, registers, layer)
    samples = TokenSamples(layout)
    both, plain = _Reservoir(max_samples), _Reservoir(max_samples)
    running = evaluating(tower.module)
    with running, keep_layer(tower, layer) as kept, watch_patches(tower) as grid:
        for batch in batches:
            tower.run(batch.inputs)
            hidden = kept[0]
            patches = hidden[:, layout.first_patch :]
            pixels = None
            if places:
                patches, pixels = patches[:, : _settle_grid(samples, grid, batch, patches.shape[1])], grid.pixels()
            outlying = cut.mask(patches).cpu().numpy() if cut is not None else np.zeros(patches.shape[:2], bool)
            chosen = []
            for row, mask in enumerate(outlying):
                rng = np.random.default_rng((seed, samples.num_images + row))
                found, rest = np.flatnonzero(mask), np.flatnonzero(~mask)
                if not len(rest):
                    continue
                count = min(len(found), len(rest), tokens_per_image)
                reservoir = both if count else plain
                if (slot := reservoir.slot(rng)) is None:
                    continue
                drawn = {"outlier": rng.permutation(found)[:count]} if count else {}
                drawn["normal"] = rng.permutation(rest)[: count or tokens_per_image]
                chosen.append((row, reservoir, slot, drawn))
            for row, reservoir, slot, drawn in chosen:
                reservoir.put(slot, _image_tokens(batch, row, samples.num_images, hidden, layout, drawn, pixels))
            samples.num_images += batch.size
            samples.num_patches += outlying.size
            samples.num_outliers += int(outlying.sum())
    samples.num_images_with_both = both.seen
    samples.with_both, samples.plain = both.items, plain.items
    return samples


def _settle_grid(samples: TokenSamples, grid: PatchGrid, batch: Batch, count: int) -> int:
    """Number of patches, of ``count`` tokens behind CLS and registers."""
    try:
        shape = grid.shape(batch.size, count, batch.inputs)
    except UnsupportedModelError as error:
        hint = 'Only classification can be probed then: probe_tokens(..., tasks=("classification",))'
        raise UnsupportedModelError(f"{error}. {hint}") from error
    if samples.grid not in (None, shape):
        raise ValueError(
            f"pictures of several sizes: {samples.grid} patches, then {shape}; a probe of places needs one grid"
        )
    samples.grid = shape
    return shape[0] * shape[1]


def _image_tokens(
    batch: Batch,
    row: int,
    start: int,
    hidden: torch.Tensor,
    layout: TokenLayout,
    drawn: dict[str, npt.NDArray[np.int64]],
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
