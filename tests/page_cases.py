"""Audit reports made by hand, for tests of what shows them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from register_adapter import ArtifactReport
from register_adapter.artifacts import LayerReport, Threshold
from register_adapter.artifacts.report import AttentionShares, MassiveChannel, NormDistribution

__all__ = ["distribution", "make_layer", "make_report"]

HEADS = 4


def distribution(norms: Any, bins_per_octave: int = 32) -> NormDistribution:
    """The distribution of an array of norms."""
    norms = np.asarray(norms, np.float64).ravel()
    low = math.floor(math.log2(norms.min()) * bins_per_octave)
    high = math.ceil(math.log2(norms.max()) * bins_per_octave) + 1
    edges = 2.0 ** (np.arange(low, high + 1) / bins_per_octave)
    names = ("0", "0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99", "1")
    quantiles = {name: float(np.quantile(norms, float(name))) for name in names}
    counts = np.histogram(norms, edges)[0]
    return NormDistribution(len(norms), norms.mean(), norms.std(), quantiles, edges.tolist(), counts.tolist())


def make_layer(
    index: int, norms: Any, threshold: Threshold, grid: tuple[int, int], last: bool, registers: int = 0
) -> LayerReport:
    """One layer with ``(images, h * w)`` patch norms; what is not norms is plausible."""
    norms = np.asarray(norms)
    hits = threshold.outliers(norms) if threshold.separated else np.zeros(norms.shape, bool)
    share = float(hits.mean())
    kinds = {"patch": distribution(norms), "cls": distribution(norms.mean(1) * 1.5)}
    if registers:
        kinds["register"] = distribution(norms.mean(1) * 0.5)
    heads = [share * (3 + head) for head in range(HEADS)]
    other = [1 - head_share - 0.2 for head_share in heads]
    shares = {"outlier": heads, "other": other, "cls": [0.2] * HEADS, "register": [0.0] * HEADS}
    return LayerReport(
        layer=index,
        norms=kinds,
        threshold=threshold,
        outlier_share=share,
        low_share=0.0,
        images_with_outliers=float(hits.any(1).mean()),
        per_image_mean=float(hits.sum(1).mean()),
        per_image_std=float(hits.sum(1).std()),
        massive_channels=[MassiveChannel(7, 40.0 + index, 12.5), MassiveChannel(3, 20.0, 6.25)],
        similarity={"outlier": 0.97, "other": 0.8} if share else None,
        border_distance={"outlier": 1.2, "other": 2.1} if share else None,
        position_map=hits.mean(0).reshape(grid).tolist(),
        recurrence=2.5 if share else None,
        attention=None if last else AttentionShares(shares, {**shares}),
    )


def make_report(
    name: str = "planted", layers: int = 5, first: int | None = 3, registers: int = 0, strength: float = 8.0
) -> ArtifactReport:
    """A model whose outliers begin at layer ``first`` (``None``: it has none)."""
    rng, grid, images = np.random.default_rng(0), (6, 8), 40
    hits = rng.random((images, grid[0] * grid[1])) < 0.02
    layer_reports = []
    for index in range(layers):
        norms = 10 * 1.3**index * np.exp(0.1 * rng.standard_normal((images, grid[0] * grid[1])))
        if first is not None and index >= first:
            norms = np.where(hits, norms * strength, norms)
            threshold = Threshold("mad", high=30 * 1.3**index, separated=True, reason="two kinds of tokens")
        else:
            threshold = Threshold("mad", reason="one kind of tokens")
        layer_reports.append(make_layer(index, norms, threshold, grid, index == layers - 1, registers))
    return ArtifactReport(
        name=name,
        verdict="none" if first is None else "present",
        reason="No layer has outliers."
        if first is None
        else f"2 % of the patches have 8 times the median from layer {first}.",
        first_layer=first,
        layers=layer_reports,
        rule="mad",
        family="vit",
        num_images=images,
        num_registers=registers,
        native_registers=0,
        grid=grid,
        relative_error=0.011,
        definitions={
            "norm": "L2 norm of a token before the final LayerNorm.",
            "threshold": "Where the rule draws the line.",
        },
        environment={"versions": {"torch": "2.15.0"}, "seconds": 1.25},
    )
