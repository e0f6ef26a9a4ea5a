"""Arrays as colours and as images inside a page: colour maps, principal components, PNG and JPEG as data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

__all__ = ["COLOUR_MAPS", "coloured", "data_url", "principal_colours"]

Array = npt.NDArray[np.float32]

_VIRIDIS = (
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
    "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
)
_INFERNO = (
    "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 "
    "d24644 e45a31 f1731d f98e09 fcac11 f9cb35 f2ea69 fcffa4"
)
#: Matplotlib's colour maps of these names (public domain, CC0) at 17 even steps; in between is linear.
COLOUR_MAPS = {"viridis": _VIRIDIS.split(), "inferno": _INFERNO.split()}


def coloured(values: npt.ArrayLike, colour_map: str, high: float | None = None) -> npt.NDArray[np.uint8]:
    """``(h, w, 3)`` colours of ``(h, w)`` values: 0 is the colour map's first colour, ``high`` its last.

    Args:
        values: Not negative; what is not finite counts as 0.
        colour_map: Name in :data:`COLOUR_MAPS`.
        high: ``None`` takes the largest value.
    """
    array = np.nan_to_num(np.asarray(values, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    top = float(array.max() if high is None else high) or 1.0
    steps = np.array([[int(hexa[i : i + 2], 16) for i in (0, 2, 4)] for hexa in COLOUR_MAPS[colour_map]], np.float32)
    place = np.clip(array / top, 0, 1)
    channels = [np.interp(place, np.linspace(0, 1, len(steps)), steps[:, channel]) for channel in range(3)]
    pixels: npt.NDArray[np.uint8] = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return pixels


def principal_colours(
    features: Sequence[torch.Tensor], grids: Sequence[tuple[int, int]], like: Sequence[Array] | None = None
) -> list[Array]:
    """First three principal components of patch tokens as red, green and blue, as in figure 1 of DINOv2's paper.

    The components are fitted on the patches of all images together (arXiv 2304.07193), so that one colour means the
    same thing in all of them. Every component is scaled so that its 2nd percentile is 0 and its 98th is 1, lest a few
    outliers take the colour from the rest. The sign of a component is arbitrary; it is such that its largest loading is
    positive. With ``like``, signs and the order of the three are those that agree best with it.

    Args:
        features: ``(h * w, D)`` patch tokens, one entry per image.
        grids: Their ``(h, w)``.
        like: Colours of the same patches under another model, to follow.

    Returns:
        ``(h, w, 3)`` float32 in 0…1 each. Components that D or the number of patches does not yield are 0.
    """
    together = torch.cat([image.double() for image in features])
    centred = together - together.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.flip(1)[:, : min(3, len(together))]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    scores = torch.zeros(len(together), 3, dtype=torch.float64)
    scores[:, : axes.shape[1]] = centred @ axes
    if like is not None:
        scores = _agreeing(scores, torch.cat([torch.from_numpy(image).reshape(-1, 3) for image in like]).double())
    low, high = torch.quantile(scores[:: max(1, len(scores) // 100_000)], torch.tensor([0.02, 0.98]).double(), dim=0)
    scaled = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    parts = scaled.split([len(image) for image in features])
    return [part.reshape(*grid, 3).numpy() for part, grid in zip(parts, grids, strict=True)]


def _agreeing(scores: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The three columns of ``scores`` in the order and with the signs that correlate best with those of ``wanted``."""
    first, second = (values - values.mean(0) for values in (scores, wanted))
    first, second = (values / values.norm(dim=0).clamp_min(1e-12) for values in (first, second))
    correlation = first.T @ second
    places = torch.arange(3)
    order = max(permutations(range(3)), key=lambda candidate: float(correlation[list(candidate), places].abs().sum()))
    chosen = correlation[list(order), places]
    return scores[:, list(order)] * torch.where(chosen < 0, -1.0, 1.0)


def data_url(pixels: npt.NDArray[Any], photograph: bool = False, longest: int = 512) -> str:
    """``(H, W, 3)`` uint8 as a ``data:`` URL.

    Args:
        pixels: What to encode.
        photograph: JPEG, which is smaller for photographs; otherwise PNG, which keeps every value.
        longest: Photographs with a longer side are made smaller.
    """
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if photograph:
        image.thumbnail((longest, longest))
        image.save(buffer, "JPEG", quality=85)
    else:
        image.save(buffer, "PNG", optimize=True)
    kind = "jpeg" if photograph else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
