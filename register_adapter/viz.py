"""Pictures of what registers do: norm maps and attention maps, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .capture import capture
from .errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Maps", "plot_before_after", "read_maps"]


@dataclass(frozen=True)
class Maps:
    """Maps of a few pictures under one model.

    Attributes:
        name: What to call the model above its columns.
        norms: ``(B, h, w)`` float32, L2 norms of the patch tokens behind the last block, before the final LayerNorm.
        attention: ``(B, h, w)`` float32, attention of CLS to the patches in the last block, mean over heads; where
            there is no CLS, the attention that a patch receives, mean over all queries.
    """

    name: str
    norms: npt.NDArray[np.float32]
    attention: npt.NDArray[np.float32]


@torch.no_grad()
def read_maps(name: str, model: nn.Module, pixel_values: torch.Tensor) -> Maps:
    """Norm and attention maps of ``(B, 3, H, W)`` pixel values under ``model``, with or without registers."""
    with capture(model) as trace:
        model(pixel_values=pixel_values)
    first = trace.prefix + trace.num_registers
    queries = trace.attentions[-1].float().mean(1)
    attention = (queries[:, 0] if trace.prefix else queries.mean(1))[:, first:]
    norms = trace.patches().float().norm(dim=-1)
    height, width = pixel_values.shape[-2:]
    rows = round((norms.shape[1] * height / width) ** 0.5)
    shape = (len(norms), rows, norms.shape[1] // rows)
    return Maps(name, norms.reshape(shape).cpu().numpy(), attention.reshape(shape).cpu().numpy())


def plot_before_after(pictures: Sequence[Any], maps: Sequence[Maps], path: str | Path | None = None) -> Figure:
    """One row a picture: the picture, then its norm map and its attention map under every model.

    Norm maps share one colour scale over the whole figure, so that columns can be compared; attention maps are scaled
    each to its own largest value, as is usual.

    Args:
        pictures: Arrays ``(H, W, 3)`` or PIL images.
        maps: One entry a model, of the same pictures.
        path: Where to save the figure; ``None`` does not save it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("figures", "matplotlib", "viz") from error

    rows, columns = len(pictures), 1 + 2 * len(maps)
    figure = Figure(figsize=(1.7 * columns + 0.6, 1.7 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    limit = max(float(one.norms.max()) for one in maps)
    shown = None
    for row, picture in enumerate(pictures):
        axes[row, 0].imshow(picture)
        for number, one in enumerate(maps):
            shown = axes[row, 1 + number].imshow(one.norms[row], vmin=0, vmax=limit, cmap="viridis")
            axes[row, 1 + len(maps) + number].imshow(one.attention[row], vmin=0, cmap="inferno")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0, 0].set_title("picture", fontsize=9)
    for number, one in enumerate(maps):
        axes[0, 1 + number].set_title(f"norm\n{one.name}", fontsize=9)
        axes[0, 1 + len(maps) + number].set_title(f"attention\n{one.name}", fontsize=9)
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes[:, 1 : 1 + len(maps)], location="bottom", shrink=0.6, aspect=40)
        bar.set_label("L2 norm of patch tokens, last block, before the final LayerNorm", fontsize=8)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure
