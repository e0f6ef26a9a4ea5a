"""What k-NN and linear classifiers have in common: features of a training set and a test set under each model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...features.subjects import Subject
from ...utils.environment import versions
from .reading import ImageFeatures, Reading, describe, read_features
from .results import Metric
from .samples import label_images, name_of, refuse_leaks

__all__ = ["ACCURACY", "TwoSets", "common_settings", "device_of", "read_sets", "reading_of", "settings_of"]

ACCURACY = Metric("top-1 accuracy", "share of the test images whose likeliest class is theirs")


@dataclass(frozen=True)
class TwoSets:
    """Features of the images of both sets, and their classes.

    Attributes:
        features: By model, of the training images and of the test images.
        train_labels: ``(n,)`` int64.
        test_labels: ``(q,)`` int64.
        classes: Their names.
        models: What each model is.
        skipped: Names of bad images that were left out.
    """

    features: Mapping[str, tuple[ImageFeatures, ImageFeatures]]
    train_labels: npt.NDArray[np.int64]
    test_labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    models: Mapping[str, Mapping[str, Any]]
    skipped: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """What a reader should know: test images whose class nobody could learn."""
        unseen = ~np.isin(self.test_labels, self.train_labels)
        if not unseen.any():
            return []
        numbers = np.unique(self.test_labels[unseen]).tolist()
        names = [self.classes[number] if number < len(self.classes) else str(number) for number in numbers]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        return [
            f"no training image is of {', '.join(map(repr, names[:10]))}{more}: "
            f"the {int(unseen.sum())} test images that are count as wrong"
        ]


def reading_of(
    image_processor: Any,
    batch_size: int,
    num_workers: int,
    strict: bool,
    progress: bool,
    antialias: bool,
    store: Any,
) -> Reading:
    """The arguments of an evaluation that say how images are read.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return Reading(image_processor, batch_size, num_workers, strict, progress, antialias, store)


def read_sets(subjects: Mapping[str, Subject], train: Any, test: Any, *, blocks: int, reading: Reading) -> TwoSets:
    """Read both sets under every model.

    Args:
        subjects: Models by name.
        train: See :func:`~register_adapter.evaluation.downstream.samples.label_images`.
        test: The same.
        blocks: Number of the last blocks whose tokens are read.
        reading: How images are read.

    Raises:
        ValueError: An image is in both sets, or they have other resolutions; and see
            :func:`~register_adapter.evaluation.downstream.reading.read_features`.
    """
    learned = label_images(train)
    asked = label_images(test, learned.classes)
    refuse_leaks(learned.images, asked.images, reading.progress)
    features: dict[str, tuple[ImageFeatures, ImageFeatures]] = {}
    for name, subject in subjects.items():
        first, second = (
            read_features(subject, data.images, blocks=blocks, reading=reading, title=f"{name}: {what} images")
            for data, what in ((learned, "training"), (asked, "test"))
        )
        if first.size != second.size:
            raise ValueError(
                f"training images are given to {name} as {first.size} and test images as {second.size}; features of "
                "several resolutions are not comparable"
            )
        features[name] = first, second
    kept = [[pair[which].numbers for pair in features.values()] for which in (0, 1)]
    if any(not np.array_equal(numbers, of_set[0]) for of_set in kept for numbers in of_set):
        raise ValueError("the models could read different images; give one image_processor, or strict=True")
    skipped = [
        name_of(data.images[number], number)
        for data, of_set in ((learned, kept[0]), (asked, kept[1]))
        for number in sorted(set(range(len(data))) - set(of_set[0].tolist()))
    ]
    return TwoSets(
        features,
        learned.labels[kept[0][0]],
        asked.labels[kept[1][0]],
        learned.classes,
        {name: describe(subject) for name, subject in subjects.items()},
        tuple(skipped),
    )


def device_of(subject: Subject) -> torch.device:
    """Where a model is, and what is computed of its features."""
    model = subject[0] if isinstance(subject, tuple) else subject
    return next(model.parameters()).device


def common_settings(reading: Reading, sets: TwoSets, seed: int) -> dict[str, Any]:
    """Choices of every classification."""
    size = next(iter(sets.features.values()))[0].size
    return {"pixel_values": list(size), "classes": list(sets.classes), **settings_of(reading, seed)}


def settings_of(reading: Reading, seed: int) -> dict[str, Any]:
    """Choices of every task."""
    processor = reading.image_processor
    return {
        "seed": seed,
        "antialias": reading.antialias,
        "image_processor": "the model's own" if processor is None else type(processor).__name__,
        "interval": "95 %, percentile bootstrap over test images; differences are paired by image",
        "versions": versions(),
    }
