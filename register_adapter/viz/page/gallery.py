"""Images and their maps as parts of a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...artifacts.report import ArtifactReport
from ..colours import COLOUR_MAPS, coloured, data_url
from ..examples import Example
from ..maps import ImageMaps
from .markup import Markup, element
from .seen import colours_seen, peak_seen

__all__ = ["image_article", "images_note", "place_maps", "ramps"]

#: Layers that a row of norm maps shows, at most.
_LAYERS = 26
#: How shares are written.
_SHARE = ".2%"


def _tile(pixels: Any, alt: str, words: str) -> Markup:
    """A photograph."""
    height, width = pixels.shape[:2]
    image = element("img", src=data_url(pixels, True), alt=alt, width=width, height=height, class_="photo")
    return element("figure", image, element("figcaption", words), class_="tile")


def _colours(pixels: Any, alt: str, words: str) -> Markup:
    """A map that is in colours already."""
    height, width = pixels.shape[:2]
    image = element("img", src=data_url(pixels), alt=alt, width=width, height=height, class_="map")
    return element("figure", image, element("figcaption", words), class_="tile")


def _map(values: Any, colour_map: str, what: str, words: str, high: float | None = None, form: str = ".3g") -> Markup:
    """A map of numbers, its colour bar, and what is seen on it."""
    array = np.asarray(values)
    height, width = array.shape
    top = float(np.nan_to_num(array, posinf=0.0, neginf=0.0).max()) if high is None else high
    image = element(
        "img",
        src=data_url(coloured(array, colour_map, top)),
        alt=f"{what}: {peak_seen(array, form)}",
        width=width,
        height=height,
        class_="map",
    )
    ramp = element("span", class_=f"ramp {colour_map}")
    bar = element("span", "0", ramp, f"{top:{form}}", class_="range", aria_hidden="true")
    return element("figure", image, bar, element("figcaption", words), class_="tile")


def ramps() -> str:
    """The style of colour bars, for the head of a page."""
    rules = [
        f".ramp.{name} {{ background: linear-gradient(90deg, {', '.join(f'#{colour}' for colour in colours)}); }}"
        for name, colours in COLOUR_MAPS.items()
    ]
    return "\n".join(rules) + "\n"


def _scale(colour_map: str, words: str) -> Markup:
    return element("span", element("span", class_=f"ramp {colour_map}"), words, class_="scale")


def images_note(examples: Sequence[Example]) -> Markup:
    """What the maps are, for the head of the section."""
    shown = next(iter(examples[0].maps.values()))
    whose = {maps.query for maps in examples[0].maps.values()}
    block = f"block {shown.block}"
    parts = []
    if "CLS" in whose:
        parts.append(f"Attention of CLS to the patches in {block}, mean over heads.")
    if whose - {"CLS"}:
        parts.append(f"Without a CLS: the attention that a patch receives in {block}, mean over all queries and heads.")
    parts.append("Each attention map is scaled to its own largest value, which its colour bar names.")
    norm = "behind" if shown.normed else "before"
    parts.append(
        f"PCA colours: the first three principal components of the patch tokens of {block}, {norm} the final LayerNorm"
        ", fitted on all images of a model together; 2nd to 98th percentile of each; in further models in the order "
        "and with the signs that agree best with the first. Norms: L2, before the final "
        "LayerNorm; all models and images share one scale at a layer."
    )
    ramps = [_scale("inferno", "attention, 0 to largest"), _scale("viridis", "norm, 0 to largest at the layer")]
    return element("div", element("p", " ".join(parts)), element("p", ramps, class_="scales"))


def image_article(example: Example, highest: Sequence[float]) -> Markup:
    """One image under every model.

    Args:
        example: The image and its maps.
        highest: Upper end of the scale of norms at every layer.
    """
    height, width = example.image.shape[:2]
    image = _tile(example.image, f"The image {example.name}, {width} × {height} pixels", example.name)
    rows = [
        element(
            "div", element("h4", name), element("div", _overview(name, maps, highest), class_="tiles"), class_="row"
        )
        for name, maps in example.maps.items()
    ]
    return element(
        "article",
        element("div", image, class_="subject"),
        element("div", rows, class_="rows"),
        element(
            "div",
            _details("Attention, head by head", example, lambda name, maps: _heads(name, maps)),
            _details("Norms, layer by layer", example, lambda name, maps: _layers(name, maps, highest)),
            class_="more",
        ),
        class_="image",
    )


def _details(title: str, example: Example, tiles: Any) -> Markup:
    rows = [
        element("div", element("h4", name), element("div", tiles(name, maps), class_="tiles small"), class_="row")
        for name, maps in example.maps.items()
    ]
    return element("details", element("summary", title), rows)


def _overview(name: str, maps: ImageMaps, highest: Sequence[float]) -> Iterator[Markup]:
    last = len(maps.norms) - 1
    query = "CLS attention" if maps.query == "CLS" else "attention received"
    yield _map(maps.attention.mean(0), "inferno", f"{query} under {name}, mean over heads", query, form=_SHARE)
    if maps.colours is not None:
        colours = np.rint(maps.colours * 255).astype(np.uint8)
        seen = colours_seen(maps.colours)
        yield _colours(colours, f"Principal components under {name} as colours: {seen}", "PCA colours")
    yield _map(maps.norms[last], "viridis", f"Patch norms under {name} at layer {last}", "norms", highest[last])
    for label, values in zip(maps.register_names, maps.registers, strict=True):
        yield _map(values, "inferno", f"Attention of {label} under {name}", label, form=_SHARE)


def _heads(name: str, maps: ImageMaps) -> Iterator[Markup]:
    yield _map(maps.attention.mean(0), "inferno", f"Attention under {name}, mean over heads", "mean", form=_SHARE)
    for head, values in enumerate(maps.attention):
        yield _map(values, "inferno", f"Attention of head {head} under {name}", f"head {head}", form=_SHARE)


def _layers(name: str, maps: ImageMaps, highest: Sequence[float]) -> Iterator[Markup]:
    for layer in _spread(len(maps.norms)):
        what = f"Patch norms under {name} at layer {layer}"
        yield _map(maps.norms[layer], "viridis", what, f"layer {layer}", highest[layer])


def _spread(count: int) -> list[int]:
    """All of ``count`` indices, or as many as are shown, evenly spaced, with both ends."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, _LAYERS))})


def highest_norms(examples: Sequence[Example]) -> list[float]:
    """The largest patch norm at every layer, over all images and models."""
    maps = [image for example in examples for image in example.maps.values()]
    depth = max(len(image.norms) for image in maps)
    return [
        max(float(image.norms[layer].max()) for image in maps if layer < len(image.norms)) for layer in range(depth)
    ]


def place_maps(report: ArtifactReport) -> Markup | None:
    """Where outliers fall, one map per layer that has some; ``None`` without any."""
    layers = [layer for layer in report.layers if layer.position_map is not None and layer.outlier_share]
    if not layers:
        return None
    high = max(float(np.max(layer.position_map)) for layer in layers if layer.position_map is not None)
    tiles = [
        _map(
            np.asarray(layer.position_map),
            "viridis",
            f"Share of the images with an outlier, by place, at layer {layer.layer}",
            f"layer {layer.layer}",
            high,
            _SHARE,
        )
        for layer in layers
    ]
    words = f"share of the images with an outlier at that place, 0 to {high:.1%}"
    return element(
        "div",
        element("h3", "Where outliers fall"),
        element("div", tiles, class_="tiles"),
        element("p", _scale("viridis", words), class_="scales"),
    )
