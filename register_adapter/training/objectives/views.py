"""Views of an image, and the mean of its patch tokens over them: artifacts move with the view, content does not.

The recipe is that of "Vision Transformers with Self-Distilled Registers" (arXiv 2505.21501): the identity view first,
then shifts within 15 % of the grid in whole patches, picked from random candidates by farthest-point sampling, flipped
at random, padded with white. Mapped back to the image's own frame, a patch's tokens are averaged over the views that
show it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["MOST_VIEWS", "View", "choose_views", "denoised_tokens", "make_view", "map_back"]

#: Share of the grid's side that a view is shifted by at most.
MOST_SHIFT = 0.15
_CANDIDATES = 100
#: More views than candidates would be the same ones again.
MOST_VIEWS = 100


@dataclass(frozen=True)
class View:
    """What is done to an image: a shift in whole patches, down and to the right, and then a flip left to right."""

    down: int = 0
    right: int = 0
    flip: bool = False


def choose_views(count: int, grid: tuple[int, int], seed: int, most_shift: float = MOST_SHIFT) -> list[View]:
    """The views of one image; the same seed gives the same ones.

    Args:
        count: Number of views, at least 1; the first is the image itself.
        grid: Rows and columns ``(h, w)`` of patches.
        seed: Of this image.
        most_shift: Largest shift, as a share of the grid's side.

    Raises:
        ValueError: ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"there must be at least 1 view, got {count}")
    generator = torch.Generator().manual_seed(seed)
    most = [max(1, round(side * most_shift)) for side in grid]
    candidates = torch.stack([torch.randint(-m, m + 1, (_CANDIDATES,), generator=generator) for m in most], 1)
    flips = torch.rand(count, generator=generator) < 0.5
    chosen = torch.zeros(1, 2, dtype=torch.int64)
    while len(chosen) < count:
        distances = torch.cdist(candidates.float(), chosen.float()).amin(1)
        chosen = torch.cat([chosen, candidates[distances.argmax()][None]])
    return [
        View(int(d), int(r), bool(f) and number > 0)
        for number, ((d, r), f) in enumerate(zip(chosen, flips, strict=True))
    ]


def _windows(shift: int, length: int) -> tuple[slice, slice]:
    """Where the visible part lies in the image and in the view shifted by ``shift``."""
    return slice(max(0, -shift), length - max(0, shift)), slice(max(0, shift), length - max(0, -shift))


def make_view(pixels: torch.Tensor, view: View, patch_size: tuple[int, int], fill: torch.Tensor) -> torch.Tensor:
    """The view of an image.

    Args:
        pixels: ``(3, H, W)``.
        view: What is done.
        patch_size: Height and width of a patch in pixels.
        fill: ``(3,)``, the colour of what comes in from outside.
    """
    shifted = fill.to(pixels)[:, None, None].expand_as(pixels).clone()
    rows, new_rows = _windows(view.down * patch_size[0], pixels.shape[1])
    columns, new_columns = _windows(view.right * patch_size[1], pixels.shape[2])
    shifted[:, new_rows, new_columns] = pixels[:, rows, columns]
    return shifted.flip(-1) if view.flip else shifted


def map_back(tokens: torch.Tensor, view: View, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A view's patch tokens in the image's own frame.

    Args:
        tokens: ``(P, D)``, row by row.
        view: What was done to the image.
        grid: ``(h, w)`` with ``h * w == P``.

    Returns:
        Tokens ``(P, D)``, zero where the view does not show the patch, and ``(P,)`` bool: where it does.
    """
    there = tokens.view(*grid, -1)
    there = there.flip(1) if view.flip else there
    rows, new_rows = _windows(view.down, grid[0])
    columns, new_columns = _windows(view.right, grid[1])
    back, seen = torch.zeros_like(there), torch.zeros(grid, dtype=torch.bool, device=tokens.device)
    back[rows, columns], seen[rows, columns] = there[new_rows, new_columns], True
    return back.flatten(0, 1), seen.flatten()


def denoised_tokens(
    tokens_of: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    seeds: Sequence[int],
    grid: tuple[int, int],
    fill: torch.Tensor,
    num_views: int = 10,
    batch_size: int | None = None,
) -> torch.Tensor:
    """The mean of each patch's tokens over the views that show it.

    Args:
        tokens_of: The frozen teacher, from ``(n, 3, H, W)`` to patch tokens ``(n, P, D)``.
        pixel_values: ``(B, 3, H, W)``.
        seeds: One an image; its views depend on nothing else.
        grid: ``(h, w)`` of the patches.
        fill: ``(3,)``, the colour of padding, white in the published recipe.
        num_views: Number of views; 1 is the teacher's own answer.
        batch_size: Number of views in one pass of the teacher; default one view of every image.

    Returns:
        ``(B, P, D)`` float32.
    """
    height, width = pixel_values.shape[-2:]
    patch = (height // grid[0], width // grid[1])
    views = [choose_views(num_views, grid, seed) for seed in seeds]
    pairs = [(image, view) for number in range(num_views) for image, view in enumerate(row[number] for row in views)]
    size = batch_size or len(pixel_values)
    sums, counts = None, None
    for first in range(0, len(pairs), size):
        part = pairs[first : first + size]
        tokens = tokens_of(torch.stack([make_view(pixel_values[image], view, patch, fill) for image, view in part]))
        if sums is None or counts is None:
            sums = torch.zeros(len(pixel_values), *tokens.shape[1:], device=tokens.device)
            counts = torch.zeros(len(pixel_values), tokens.shape[1], 1, device=tokens.device)
        for (image, view), values in zip(part, tokens.float(), strict=True):
            back, seen = map_back(values, view, grid)
            sums[image] += back
            counts[image, :, 0] += seen
    assert sums is not None
    assert counts is not None
    return sums / counts
