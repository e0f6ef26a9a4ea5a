"""Views of an image, and the mean of its patch tokens over them: artifacts move with the view, content does not.

The recipe is that of "Vision Transformers with Self-Distilled Registers" (arXiv 2505.21501): the identity view first,
then shifts within 15 % of the grid in whole patches, picked from random candidates by farthest-point sampling, flipped
at random, padded with white. Mapped back to the image's own frame, a patch's tokens are averaged over the views that
show it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["MOST_VIEWS", "View", "choose_views", "denoised_tokens", "make_views", "map_back"]

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
    drawn = [torch.randint(-m, m + 1, (_CANDIDATES,), generator=generator) for m in most]
    candidates = torch.stack(drawn, 1).numpy()
    flips = (torch.rand(count, generator=generator) < 0.5).tolist()
    # Squared distances are whole numbers: every machine picks the same views.
    distances, views = (candidates**2).sum(1), [View()]
    while len(views) < count:
        shift = candidates[distances.argmax()]
        views.append(View(int(shift[0]), int(shift[1]), flips[len(views)]))
        distances = np.minimum(distances, ((candidates - shift) ** 2).sum(1))
    return views


def _windows(shift: int, length: int) -> tuple[slice, slice]:
    """Where the visible part lies in the image and in the view shifted by ``shift``."""
    return slice(max(0, -shift), length - max(0, shift)), slice(max(0, shift), length - max(0, -shift))


def make_views(
    pixel_values: torch.Tensor, views: Sequence[View], patch_size: tuple[int, int], fill: torch.Tensor
) -> torch.Tensor:
    """A view of each image.

    Args:
        pixel_values: ``(n, 3, H, W)``.
        views: n of them: what is done.
        patch_size: Height and width of a patch in pixels.
        fill: ``(3,)``, the colour of what comes in from outside.

    Returns:
        ``(n, 3, H, W)``.
    """
    shown = fill.to(pixel_values)[:, None, None].expand_as(pixel_values).clone()
    for image, pixels, view in zip(shown, pixel_values, views, strict=True):
        rows, new_rows = _windows(view.down * patch_size[0], pixels.shape[1])
        columns, new_columns = _windows(view.right * patch_size[1], pixels.shape[2])
        part = pixels[:, rows, columns]
        if view.flip:
            part = part.flip(-1)
            new_columns = slice(pixels.shape[2] - new_columns.stop, pixels.shape[2] - new_columns.start)
        image[:, new_rows, new_columns] = part
    return shown


def map_back(tokens: torch.Tensor, view: View, grid: tuple[int, int]) -> tuple[tuple[slice, slice], torch.Tensor]:
    """What a view shows, in the image's own frame.

    Args:
        tokens: ``(P, D)``, row by row.
        view: What was done to the image.
        grid: ``(h, w)`` with ``h * w == P``.

    Returns:
        The rows and columns of the image that the view shows, and their tokens ``(rows, columns, D)``.
    """
    there = tokens.view(*grid, -1)
    there = there.flip(1) if view.flip else there
    rows, new_rows = _windows(view.down, grid[0])
    columns, new_columns = _windows(view.right, grid[1])
    return (rows, columns), there[new_rows, new_columns]


def denoised_tokens(
    tokens_of: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    seeds: Sequence[int],
    grid: tuple[int, int],
    fill: torch.Tensor,
    num_views: int = 10,
    batch_size: int | None = None,
    plain: torch.Tensor | None = None,
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
        plain: ``(B, P, D)``, the teacher's tokens of the images themselves, where they are known already.

    Returns:
        ``(B, P, D)`` float32.
    """
    height, width = pixel_values.shape[-2:]
    patch = (height // grid[0], width // grid[1])
    views = [choose_views(num_views, grid, seed) for seed in seeds]
    pairs = [(image, row[number]) for number in range(num_views) for image, row in enumerate(views)]
    size = batch_size or len(pixel_values)
    sums: torch.Tensor | None = None
    counts = torch.zeros(len(pixel_values), *grid, 1)
    if plain is not None:
        sums, counts = plain.float().view(len(plain), *grid, -1).clone(), counts + 1
        pairs = pairs[len(pixel_values) :]
    for first in range(0, len(pairs), size):
        images, shown = zip(*pairs[first : first + size], strict=True)
        given = pixel_values[list(images)] if images != tuple(range(len(pixel_values))) else pixel_values
        tokens = tokens_of(make_views(given, shown, patch, fill)).float()
        if sums is None:
            sums = torch.zeros(len(pixel_values), *grid, tokens.shape[-1], device=tokens.device)
        for image, view, values in zip(images, shown, tokens, strict=True):
            where, back = map_back(values, view, grid)
            sums[image][where] += back
            counts[image][where] += 1
    assert sums is not None
    return (sums / counts.to(sums.device)).flatten(1, 2)
