"""The maps as figures of matplotlib, without its global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifacts.report import ArtifactReport
from ..data.images import load_image
from ..errors import MissingExtraError
from ..evaluation.discovery import DiscoveredObject, LostObject, TokenCutObject
from ..utils.staging import file_to_write, staged
from .examples import Example
from .maps import Maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "plot_attention",
    "plot_before_after",
    "plot_discovery",
    "plot_norm_histograms",
    "plot_norm_maps",
    "plot_pca",
    "plot_registers",
]

_DPI = 110
_ATTENTION = "share of the attention that a patch receives"
_NORM = "L2 norm of patch tokens, before the final LayerNorm"


def _grid(rows: int, columns: int, side: float = 1.6, ticks: bool = False, **options: Any) -> tuple[Figure, Any]:
    """A figure with ``(rows, columns)`` axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("figures", "matplotlib", "viz") from error
    figure = Figure(figsize=(side * columns + 0.7, side * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    if not ticks:
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
    return figure, axes


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        target = file_to_write(path)
        with staged(target.parent) as folder:
            figure.savefig(folder / target.name, dpi=_DPI)
    return figure


def _show(axis: Any, values: Any, example: Example, overlay: bool, colour_map: str, **options: Any) -> Any:
    """A map over the axis, of the image's own extent so that both lie on each other."""
    height, width = example.image.shape[:2]
    extent = (0, width, height, 0)
    if overlay:
        axis.imshow(example.image, extent=extent)
        options["alpha"] = 0.6
    return axis.imshow(values, extent=extent, cmap=colour_map, interpolation="nearest", **options)


def _shared_bar(figure: Figure, axes: Any, label: str, colour_map: str) -> None:
    """A colour bar for maps that are scaled each to its own largest value, which stands above or below each."""
    from matplotlib.cm import ScalarMappable

    figure.set_figheight(figure.get_figheight() + 0.5)

    bar = figure.colorbar(ScalarMappable(cmap=colour_map), ax=axes, location="bottom", shrink=0.6, aspect=40)
    bar.set_ticks([0, 1], labels=["0", "largest of each map"], fontsize=7)
    bar.set_label(label, fontsize=8)


def _range(values: Any) -> str:
    """The ends of a map's colours."""
    return f"0 to {np.max(values):.2g}"


def plot_attention(example: Example, *, overlay: bool = False, path: str | Path | None = None) -> Figure:
    """Attention to the patches: one row per model; the image, the mean over heads, then every head.

    Every map is scaled to its own largest value, as is usual; its title says which.

    Args:
        example: One of :func:`read_examples`.
        overlay: Lay the maps over the image.
        path: Where to save the figure; ``None`` does not save it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    heads = max(len(maps.attention) for maps in example.maps.values())
    figure, axes = _grid(len(example.maps), 2 + heads)
    for row, (name, maps) in zip(axes, example.maps.items(), strict=True):
        row[0].imshow(example.image)
        row[0].set_ylabel(name, fontsize=9)
        for axis, values in zip(row[1:], [maps.attention.mean(0), *maps.attention], strict=False):
            _show(axis, values, example, overlay, "inferno", vmin=0)
        row[1].set_title(f"mean\n{_range(maps.attention.mean(0))}", fontsize=8)
        for head, values in enumerate(maps.attention):
            row[2 + head].set_title(f"head {head}\n{_range(values)}", fontsize=8)
    _shared_bar(figure, axes[:, 1:], _ATTENTION, "inferno")
    shown = next(iter(example.maps.values()))
    whose = "Attention of CLS" if shown.query == "CLS" else "Attention that patches receive, mean over all queries"
    figure.suptitle(f"{whose}, block {shown.block}: {example.name}", fontsize=10)
    return _saved(figure, path)


def plot_norm_maps(example: Example, *, layers: Sequence[int] | None = None, path: str | Path | None = None) -> Figure:
    """Norms of the patch tokens, layer by layer: one row per model, one column per layer.

    A column has one colour scale for all models, from 0 to the largest norm there.

    Args:
        example: One of :func:`read_examples`.
        layers: Indices into ``hidden_states`` (0: the input of the first block); ``None`` shows all.
        path: Where to save the figure; ``None`` does not save it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    depth = max(len(maps.norms) for maps in example.maps.values())
    chosen = list(range(depth)) if layers is None else [layer % depth for layer in layers]
    figure, axes = _grid(len(example.maps), 1 + len(chosen), side=1.4)
    for row, (name, maps) in zip(axes, example.maps.items(), strict=True):
        row[0].imshow(example.image)
        row[0].set_ylabel(name, fontsize=9)
        for axis, layer in zip(row[1:], chosen, strict=True):
            if layer < len(maps.norms):
                high = _highest(example, layer)
                _show(axis, maps.norms[layer], example, False, "viridis", vmin=0, vmax=high)
                axis.set_title(f"layer {layer}\n0 to {high:.3g}", fontsize=8)
    _shared_bar(figure, axes[:, 1:], "L2 norm, each layer with a scale of its own", "viridis")
    figure.suptitle(f"{_NORM}: {example.name}", fontsize=10)
    return _saved(figure, path)


def _highest(example: Example, layer: int) -> float:
    return max(float(maps.norms[layer].max()) for maps in example.maps.values() if layer < len(maps.norms))


def plot_norm_histograms(
    reports: ArtifactReport | Sequence[ArtifactReport],
    *,
    layers: Sequence[int] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Histograms of the patch norms, layer by layer, with the audit's thresholds; both axes are logarithmic.

    Args:
        reports: What an audit found; one colour a report.
        layers: Indices into ``hidden_states`` (0: the input of the first block); ``None`` shows all.
        path: Where to save the figure; ``None`` does not save it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    several = [reports] if isinstance(reports, ArtifactReport) else list(reports)
    depth = max(len(report.layers) for report in several)
    chosen = list(range(depth)) if layers is None else [layer % depth for layer in layers]
    columns = min(3, len(chosen))
    figure, axes = _grid(-(-len(chosen) // columns), columns, side=2.4, ticks=True, sharex=True)
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    for axis, layer in zip(axes.flat, chosen, strict=False):
        for number, report in enumerate(several):
            shown = report.layers[layer] if layer < len(report.layers) else None
            norms = shown.norms.get("patch") if shown is not None else None
            if shown is None or norms is None or not norms.counts:
                continue
            colour = f"C{number}"
            axis.stairs(norms.counts, norms.edges, fill=True, alpha=0.5, color=colour, label=report.name)
            for norm in (shown.threshold.low, shown.threshold.high):
                if shown.threshold.separated and 0 < norm < float("inf"):
                    axis.axvline(norm, color=colour, linestyle="--", linewidth=1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"layer {layer}", fontsize=9)
        axis.tick_params(labelsize=7)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.supxlabel(_NORM, fontsize=8)
    figure.supylabel("patch tokens", fontsize=8)
    return _saved(figure, path)


def plot_pca(examples: Sequence[Example], *, path: str | Path | None = None) -> Figure:
    """First three principal components of the patch tokens as red, green and blue.

    One row per image, one column per model.

    Args:
        examples: From one call of :func:`read_examples`: the components are fitted on all its images together.
        path: Where to save the figure; ``None`` does not save it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names = list(examples[0].maps)
    figure, axes = _grid(len(examples), 1 + len(names))
    for row, example in zip(axes, examples, strict=True):
        row[0].imshow(example.image)
        for axis, name in zip(row[1:], names, strict=True):
            colours = example.maps[name].colours
            if colours is not None:
                _show(axis, colours, example, False, "viridis")
    for axis, name in zip(axes[0, 1:], names, strict=True):
        axis.set_title(name, fontsize=9)
    shown = examples[0].maps[names[0]]
    norm = "behind" if shown.normed else "before"
    figure.suptitle(f"First three principal components, block {shown.block}, {norm} the final LayerNorm", fontsize=10)
    return _saved(figure, path)


def plot_registers(example: Example, *, path: str | Path | None = None) -> Figure:
    """Attention of CLS and of each register to the patches, mean over heads: one row per model.

    Every map is scaled to its own largest value; its title says which.

    Args:
        example: One of :func:`read_examples`.
        path: Where to save the figure; ``None`` does not save it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    columns = max(len(maps.registers) for maps in example.maps.values())
    figure, axes = _grid(len(example.maps), 2 + columns)
    for row, (name, maps) in zip(axes, example.maps.items(), strict=True):
        row[0].imshow(example.image)
        row[0].set_ylabel(name, fontsize=9)
        for axis, title, values in zip(
            row[1:],
            (maps.query, *maps.register_names),
            (maps.attention.mean(0), *maps.registers),
            strict=False,
        ):
            _show(axis, values, example, False, "inferno", vmin=0)
            axis.set_title(f"{title}\n{_range(values)}", fontsize=8)
    _shared_bar(figure, axes[:, 1:], _ATTENTION, "inferno")
    block = next(iter(example.maps.values())).block
    figure.suptitle(f"Attention of CLS and registers to the patches, block {block}: {example.name}", fontsize=10)
    return _saved(figure, path)


def plot_before_after(images: Sequence[Any], maps: Sequence[Maps], path: str | Path | None = None) -> Figure:
    """One row per image: the image, then its norm map and its attention map under every model.

    Norm maps share one colour scale over the whole figure, so that columns can be compared; attention maps are scaled
    each to its own largest value, as is usual, which stands below it.

    Args:
        images: Arrays ``(H, W, 3)`` or PIL images.
        maps: One entry per model, of the same images.
        path: Where to save the figure; ``None`` does not save it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, axes = _grid(len(images), 1 + 2 * len(maps), side=1.7)
    limit = max(float(model.norms.max()) for model in maps)
    shown = None
    for row, image in enumerate(images):
        axes[row, 0].imshow(np.asarray(image))
        for number, model in enumerate(maps):
            shown = axes[row, 1 + number].imshow(model.norms[row], vmin=0, vmax=limit, cmap="viridis")
            attention = axes[row, 1 + len(maps) + number]
            attention.imshow(model.attention[row], vmin=0, cmap="inferno")
            attention.set_xlabel(_range(model.attention[row]), fontsize=7)
    axes[0, 0].set_title("image", fontsize=9)
    for number, model in enumerate(maps):
        axes[0, 1 + number].set_title(f"norm\n{model.name}", fontsize=9)
        axes[0, 1 + len(maps) + number].set_title(f"attention\n{model.name}", fontsize=9)
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes[:, 1 : 1 + len(maps)], location="bottom", shrink=0.6, aspect=40)
        bar.set_label("L2 norm of patch tokens, last block, before the final LayerNorm", fontsize=8)
        _shared_bar(figure, axes[:, 1 + len(maps) :], _ATTENTION, "inferno")
    return _saved(figure, path)


def plot_discovery(
    image: Any, result: DiscoveredObject, boxes: Any = None, *, path: str | Path | None = None
) -> Figure:
    """What LOST or TokenCut found: its box and the true ones, its patches and seed, and what it decided by.

    Args:
        image: The image that was given to :func:`~register_adapter.evaluation.discovery.discover`: a path, a PIL image
            or an array ``(H, W, 3)`` uint8.
        result: What was found in it.
        boxes: True boxes ``(n, 4)``, x0 y0 x1 y1 in pixels; ``None`` shows none.
        path: Where to save the figure; ``None`` does not save it.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ImageFileError: The file is not an image.
    """
    shown = np.asarray(image if isinstance(image, np.ndarray) else load_image(image))
    height, width = shown.shape[:2]
    rows, columns = result.mask.shape
    # Patches of padding stick out of the image.
    extent = (0, columns * result.patch_size[1], rows * result.patch_size[0], 0)
    figure, axes = _grid(1, 3, side=2.6)
    for axis in axes[0, :2]:
        axis.imshow(shown, extent=(0, width, height, 0))
    for given, colour in ((boxes, "lime"), (result.box, "red")):
        for x0, y0, x1, y1 in np.asarray(() if given is None else given, np.float64).reshape(-1, 4):
            axes[0, 0].plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=colour, linewidth=2)
    axes[0, 0].set_title("box" if boxes is None else "box (red), true boxes (green)", fontsize=8)
    axes[0, 1].imshow(result.mask, extent=extent, cmap="gray", vmin=0, vmax=1, alpha=0.65)
    row, column = np.unravel_index(result.seed, result.mask.shape)
    place = (column + 0.5) * result.patch_size[1], (row + 0.5) * result.patch_size[0]
    axes[0, 1].plot(*place, "o", color="red", markeredgecolor="white")
    axes[0, 1].set_title("patches and seed", fontsize=8)
    values, title, options = _decided_by(result)
    drawn = axes[0, 2].imshow(values.reshape(rows, columns), extent=extent, interpolation="nearest", **options)
    axes[0, 2].set_title(title, fontsize=8)
    figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.4, anchor=(1.0, 0.5)).ax.tick_params(labelsize=7)
    figure.set_figheight(figure.get_figheight() + 0.5)
    for axis in axes[0]:
        axis.set_xlim(0, max(width, extent[1]))
        axis.set_ylim(max(height, extent[2]), 0)
    return _saved(figure, path)


def _decided_by(result: DiscoveredObject) -> tuple[Any, str, dict[str, Any]]:
    """What a method decided by, patch by patch, what to call it, and its colours."""
    if isinstance(result, LostObject):
        return result.degree, "degree: patches that resemble it", {"cmap": "viridis"}
    if isinstance(result, TokenCutObject):
        limit = float(np.abs(result.eigenvector).max())
        return result.eigenvector, "second eigenvector", {"cmap": "coolwarm", "vmin": -limit, "vmax": limit}
    return result.mask, "patches", {"cmap": "gray"}
