"""CorLoc of a model and its adapters, side by side, at the reference's settings and at swept ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...data.images import image_name
from ...features.layout import tower_of
from ...features.subjects import Subject, Subjects, keeping_adapters, named_subjects
from ...tuner.hooks.call_state import outside_of_readings
from .annotations import BoxedImage, boxed_scenes
from .boxes import DiscoveredObject
from .patches import FEATURES, Features
from .running import METHODS, Method, Plan, Reading, run_plans
from .scoring import DiscoveryReport, DiscoveryRow, Share, hits

__all__ = ["Sweep", "evaluate_discovery"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """What is tried on held-out images: first kinds of features and blocks, then, with the best, the method's settings.

    Of equal ones the first is taken, so that the reference's settings, which are tried too, are left for a gain only.

    Attributes:
        features: Kinds of features.
        blocks: Number of blocks, the last ones.
        options: Settings by method, a list of them each.
    """

    features: Sequence[Features] = FEATURES
    blocks: int = 4
    options: Mapping[Method, Sequence[Mapping[str, Any]]] = field(default_factory=lambda: dict(_OPTIONS))

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"a sweep needs at least one block, got blocks={self.blocks}")


_OPTIONS: dict[Method, list[dict[str, Any]]] = {
    "lost": [{"normalize": True, "bias": bias} for bias in (0.0, -0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.8)],
    "tokencut": [{"tau": tau} for tau in (0.0, 0.1, 0.3, 0.4, 0.5, 0.6)],
}


@keeping_adapters
def evaluate_discovery(
    models: Subjects,
    images: Any,
    *,
    methods: Sequence[Method] = ("lost", "tokencut"),
    features: Features = "keys",
    held_out: Any = None,
    held_out_share: float = 0.2,
    sweep: Sweep | None = Sweep(),
    image_processor: Any = None,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 16,
    antialias: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> DiscoveryReport:
    """CorLoc of LOST and TokenCut, for a model or for several, the first of which is the base of the comparison.

    Each model has two rows a method: one at the settings of the authors' code (``features`` of the last block), and one
    at the settings with the best CorLoc on held-out images, which are in no row; both rows are of the same images.

    Args:
        models: One model, or several by name: ``{"base": model, ...}``. One adapter of a PEFT model is the pair
            ``(model, "adapter's name")``, the model with its adapters disabled ``(model, None)``; a single PEFT model
            with registers stands for its base and each of its register adapters.
        images: Images with boxes: from :func:`read_voc`, :func:`read_coco`, a
            :class:`~register_adapter.testbed.SceneDataset`, or pairs of an image and its boxes ``(n, 4)``. Those
            without a box are left out.
        methods: ``"lost"``, ``"tokencut"``, or both.
        features: Of the rows at the reference's settings: ``"keys"``, as in the authors' code, ``"queries"``,
            ``"values"`` (arXiv 2309.16588 takes them for OpenCLIP and DeiT-III) or ``"tokens"``.
        held_out: Images with boxes to choose settings on; ``None`` takes ``held_out_share`` of ``images``.
        held_out_share: Which share, drawn at random.
        sweep: What is tried on them; ``None`` makes the rows of the reference's settings alone, of all images.
        image_processor: See :func:`discover`, as are the next three.
        size: Size that images are resized to before.
        batch_size: Images that go through the model together.
        antialias: Interpolate position embeddings with antialiasing.
        seed: Seed of the draw and of the bootstrap.
        progress: Show a progress bar.

    Raises:
        ValueError: There is no model or no image with a box, none is left to choose settings on, or an image is in both
            sets; and see :func:`discover`.
        ImageFileError: A file is not an image.
        UnsupportedModelError: The model has no vision tower, places of its patches are not known, or a block has no
            layer of a known name.
        MissingExtraError: SciPy is not installed.

    Example:
        >>> print(evaluate_discovery({"base": (model, None), "repaired": (model, "default")}, read_voc("VOC2007")))
    """
    subjects = named_subjects(models)
    if features not in FEATURES:
        raise ValueError(f"features={features!r}, expected one of {', '.join(FEATURES)}")
    plans = [Plan(method, features) for method in methods]
    if not plans:
        raise ValueError(f"methods is empty; it can have {', '.join(METHODS)}")
    reading = Reading(image_processor, size, batch_size, antialias, progress)
    test, skipped = _with_boxes(images)
    chosen_on: list[BoxedImage] = []
    if sweep is not None and held_out is not None:
        chosen_on, more = _with_boxes(held_out)
        skipped += more
    elif sweep is not None:
        chosen_on, test = _split(test, held_out_share, seed)
    _refuse_leaks(test, chosen_on)
    rows: dict[tuple[Method, str, bool], DiscoveryRow] = {}
    for name, subject in subjects.items():
        tried = {
            plan.method: _choose(subject, chosen_on, plan, sweep, reading, f"{name}: {plan.method}, held out")
            for plan in plans
            if sweep is not None
        }
        best = [max(tried[plan.method], key=lambda pair: pair[1])[0] for plan in plans if tried]
        both = [*plans, *best]
        objects = run_plans(subject, [item.image for item in test], both, reading, name)
        if not rows:
            _warn_of_boxes_outside(test, [per_image[0] for per_image in objects])
        for place, plan in enumerate(both):
            swept = place >= len(plans)
            boxes = tuple(tuple(map(float, per_image[place].box)) for per_image in objects)
            right = hits(boxes, [item.boxes for item in test])
            base = rows.get((plan.method, next(iter(subjects)), swept))
            rows[plan.method, name, swept] = DiscoveryRow(
                name,
                swept,
                plan,
                Share.of(right, seed),
                None if base is None else Share.of(right.astype(float) - np.array(base.right, float), seed),
                tuple(map(bool, right)),
                boxes,
                tuple(tried[plan.method]) if swept else (),
            )
    order = [
        (plan.method, name, swept)
        for plan in plans
        for name in subjects
        for swept in (False, True)
        if (plan.method, name, swept) in rows
    ]
    return DiscoveryReport(
        tuple(rows[key] for key in order),
        tuple(item.name for item in test),
        tuple(item.name for item in chosen_on),
        skipped,
    )


def _choose(
    subject: Subject, images: Sequence[BoxedImage], start: Plan, sweep: Sweep | None, reading: Reading, title: str
) -> list[tuple[Plan, float]]:
    """Every plan that is tried, with its CorLoc."""
    assert sweep is not None
    model = subject[0] if isinstance(subject, tuple) else subject
    blocks = len(tower_of(model)[0].part("blocks"))
    places = [
        replace(start, features=what, block=-1 - back)
        for what in sweep.features
        for back in range(min(sweep.blocks, blocks))
    ]
    sources, truths = [item.image for item in images], [item.boxes for item in images]

    def measured(plans: list[Plan], said: str) -> list[tuple[Plan, float]]:
        objects = run_plans(subject, sources, plans, reading, said) if plans else []
        return [
            (plan, float(hits([per_image[number].box for per_image in objects], truths).mean()))
            for number, plan in enumerate(plans)
        ]

    tried = measured([start, *(plan for plan in places if plan != start)], f"{title}, features and blocks")
    best = max(tried, key=lambda pair: pair[1])[0]
    more = [replace(best, options=options) for options in sweep.options.get(start.method, ())]
    return tried + measured(more, f"{title}, settings")


@outside_of_readings()
def _with_boxes(images: Any) -> tuple[list[BoxedImage], int]:
    """Those of the images that have a box, and the number of the others."""
    if hasattr(images, "scene"):
        images = boxed_scenes(images)
    boxed = [
        item
        if isinstance(item, BoxedImage)
        else BoxedImage(item[0], np.asarray(item[1], np.float64).reshape(-1, 4), _name(item[0], number))
        for number, item in enumerate(images)
    ]
    kept = [item for item in boxed if len(item.boxes)]
    if not kept:
        raise ValueError(f"none of {len(boxed)} images has a true box, so there is nothing to compare with")
    return kept, len(boxed) - len(kept)


def _name(image: Any, number: int) -> str:
    name = image_name(image)
    return f"image {number}" if name.endswith("without a name") else name


def _split(images: list[BoxedImage], share: float, seed: int) -> tuple[list[BoxedImage], list[BoxedImage]]:
    count = round(share * len(images))
    if not 0 < count < len(images):
        raise ValueError(
            f"{share:.0%} of {len(images)} images leave none to choose settings on, or none to measure; give more "
            "images, or sweep=None (evaluate_discovery also takes held_out= and held_out_share=)"
        )
    chosen = set(np.random.default_rng(seed).permutation(len(images))[:count].tolist())
    return [images[n] for n in sorted(chosen)], [item for n, item in enumerate(images) if n not in chosen]


def _warn_of_boxes_outside(items: Sequence[BoxedImage], objects: Sequence[DiscoveredObject]) -> None:
    """Say that true boxes are of images of another size; those that only reach over an edge are usual."""
    outside = []
    for item, found in zip(items, objects, strict=True):
        height, width = np.multiply(found.mask.shape, found.patch_size)  # padded to whole patches
        beyond = (item.boxes[:, :2] >= [width, height]).any(1) | (item.boxes[:, 2:] <= 0).any(1)
        outside += [item.name] if beyond.any() else []
    if outside:
        logger.warning(
            "%d of %d images have a true box that lies outside of them, such as %s: are the boxes those of images of "
            "another size? Nothing can hit them",
            *(len(outside), len(items), outside[0]),
        )


def _refuse_leaks(test: Sequence[BoxedImage], held_out: Sequence[BoxedImage]) -> None:
    files = {os.path.realpath(item.image) for item in held_out if isinstance(item.image, str | Path)}
    shared = [
        item.name for item in test if isinstance(item.image, str | Path) and os.path.realpath(item.image) in files
    ]
    if shared:
        raise ValueError(
            f"{len(shared)} images are measured and held out to choose settings on, such as {shared[0]}; a row of "
            "theirs would flatter the model"
        )
