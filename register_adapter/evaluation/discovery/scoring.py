"""CorLoc: the share of images whose box covers an object, and rows of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..resampling import bootstrap_mean
from .boxes import iou
from .running import Plan

__all__ = ["DiscoveryReport", "DiscoveryRow", "Share", "corloc", "hits"]

#: Overlap from which a box is right.
THRESHOLD = 0.5


def hits(
    boxes: Sequence[npt.ArrayLike], truths: Sequence[npt.ArrayLike], threshold: float = THRESHOLD
) -> npt.NDArray[np.bool_]:
    """Whether each box overlaps with any true box of its image by an intersection over union of the threshold or more.

    Args:
        boxes: One ``(4,)`` an image, x0 y0 x1 y1.
        truths: ``(n, 4)`` an image; with none the image is a miss.
        threshold: Least overlap.

    Returns:
        ``(images,)`` bool.

    Raises:
        ValueError: There are not as many boxes as images with true boxes.
    """
    if len(boxes) != len(truths):
        raise ValueError(f"{len(boxes)} boxes, and true boxes of {len(truths)} images; one box an image is needed")
    pairs = zip(boxes, truths, strict=True)
    return np.array([bool((iou(box, true) >= threshold).any()) for box, true in pairs], dtype=bool)


def corloc(boxes: Sequence[npt.ArrayLike], truths: Sequence[npt.ArrayLike], threshold: float = THRESHOLD) -> float:
    """Share of the images whose box is right, see :func:`hits`; 0.5 is the threshold of the literature.

    Args:
        boxes: One ``(4,)`` an image, x0 y0 x1 y1.
        truths: ``(n, 4)`` an image.
        threshold: Least overlap.

    Raises:
        ValueError: There are no images, or not as many boxes as images.
    """
    right = hits(boxes, truths, threshold)
    if not right.size:
        raise ValueError("CorLoc needs at least one image")
    return float(right.mean())


@dataclass(frozen=True)
class Share:
    """A share, or a difference of two, with its 95 % bootstrap interval over images."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: npt.ArrayLike, seed: int = 0) -> Share:
        """The mean of one value an image."""
        numbers = np.asarray(values, np.float64)
        return cls(float(numbers.mean()), *bootstrap_mean(numbers, seed=seed))

    def __str__(self) -> str:
        """In percent."""
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class DiscoveryRow:
    """One model under one method, at the reference's default settings or at those chosen on held-out images.

    Attributes:
        model: Its name.
        swept: Whether settings were chosen on held-out images.
        plan: Method and settings.
        corloc: Share of the images whose box is right.
        difference: Of it to the base's in the row of the same kind, paired by image; ``None`` in the base's rows.
        right: ``(images,)`` whether each box is right.
        boxes: ``(images, 4)``.
        held_out: CorLoc on the held-out images of every plan that was tried, in the order they were; ``()`` where none
            was.
    """

    model: str
    swept: bool
    plan: Plan
    corloc: Share
    difference: Share | None
    right: tuple[bool, ...]
    boxes: tuple[tuple[float, ...], ...]
    held_out: tuple[tuple[Plan, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model,
            "method": self.plan.method,
            "settings": "swept" if self.swept else "reference",
            "chosen": self.plan.to_dict(),
            "corloc": self.corloc.to_dict(),
            "difference": None if self.difference is None else self.difference.to_dict(),
            "right": list(self.right),
            "boxes": [list(box) for box in self.boxes],
            "held_out": [plan.to_dict() | {"corloc": value} for plan, value in self.held_out],
        }


@dataclass(frozen=True)
class DiscoveryReport:
    """What :func:`evaluate_discovery` measured.

    Attributes:
        rows: By method, then model, the reference's settings first.
        names: Of the images that the rows are of.
        held_out: Names of the images that settings were chosen on; none is among ``names``.
        skipped: Number of images without a true box, which are in neither.
    """

    rows: tuple[DiscoveryRow, ...]
    names: tuple[str, ...]
    held_out: tuple[str, ...]
    skipped: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "task": "discovery",
            "num_images": len(self.names),
            "num_held_out": len(self.held_out),
            "num_without_box": self.skipped,
            "images": list(self.names),
            "held_out": list(self.held_out),
            "rows": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        """A table in Markdown."""
        lines = [
            f"CorLoc in percent with 95 % intervals, {len(self.names)} images; swept: chosen on {len(self.held_out)}",
            "",
            "| method | model | settings | CorLoc | difference to the base | chosen |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in self.rows:
            chosen = ", ".join(f"{key} {value}" for key, value in row.plan.to_dict().items())
            settings = "swept" if row.swept else "reference"
            difference = "" if row.difference is None else str(row.difference)
            lines.append(f"| {row.plan.method} | {row.model} | {settings} | {row.corloc} | {difference} | {chosen} |")
        return "\n".join(lines)
