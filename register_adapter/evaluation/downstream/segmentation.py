"""Semantic segmentation by a linear classifier of patch tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...features.subjects import Subjects, keeping_adapters, named_subjects
from ..linear_models import INVERSE_PENALTIES, Fitted, fit_classifier
from .classifying import reading_of, settings_of
from .dense import DenseReader, cells_of_pixels, enlarge, two_dense_sets
from .dense_images import IGNORED, DenseImage, checked_classes, mask_scenes
from .reading import describe
from .results import Metric, TaskReport, compare_sums

__all__ = ["class_counts", "evaluate_segmentation", "mean_iou"]

_Array = npt.NDArray[Any]
MEAN_IOU = Metric(
    "mIoU",
    "intersection over union of each class over the pixels of all test images, its mean over the classes that are in "
    "the masks or the predictions",
)


@keeping_adapters
def evaluate_segmentation(
    models: Subjects,
    train: Any,
    test: Any,
    *,
    classes: Sequence[str] = (),
    size: int | tuple[int, int] | None = None,
    tokens_per_image: int = 100,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
    max_iter: int = 300,
    image_processor: Any = None,
    batch_size: int = 16,
    num_workers: int = 2,
    strict: bool = False,
    antialias: bool = True,
    store: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> TaskReport:
    """Mean IoU of a multinomial logistic regression on single patch tokens, behind the final LayerNorm.

    Whole images are resized to one size. A patch is of the class that most of its pixels have; patches with less than
    half of their pixels labelled are not learned from. The classifier's logits are enlarged to the mask
    (bilinear), and its likeliest class is compared pixel by pixel. C is chosen on held-out training images, by the
    accuracy over patches.

    Args:
        models: See :func:`~register_adapter.evaluation.evaluate_knn`, as for what is not listed here.
        train: From :func:`~register_adapter.evaluation.downstream.read_masks`, a
            :class:`~register_adapter.testbed.SceneDataset`, or pairs of an image and its mask ``(H, W)`` int, below 0
            for pixels without a class, such as -1.
        test: The same.
        classes: Their names.
        size: A side or ``(height, width)`` in pixels, made a multiple of the patch size; ``None`` takes the image
            processor's or the model's.
        tokens_per_image: Patches of a training image that are learned from, at random; 100,000 of all at most.
        inverse_penalties: Values of C that are tried, ascending.
        max_iter: Iterations of L-BFGS, at most.
        image_processor: Only its size and how it normalises is used.
        batch_size: Images in one pass.
        num_workers: Threads that read images.
        strict: Refuse bad images.
        antialias: Interpolate position embeddings with antialiasing.
        store: Folder for the patch tokens, P x D numbers of 4 bytes an image; ``None`` keeps none.
        seed: Seed of the draw of patches and of the bootstrap.
        progress: Show progress bars.

    Raises:
        ValueError: A set is empty, an image is in both, a mask cannot be read, no pixel of the test images has a
            class, or no size is known.
        ImageFileError: No image is good, or one is bad and may not be.
        UnsupportedModelError: The model has no vision tower, or places of its patches are not known.
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> sets = read_masks("VOCdevkit/VOC2012")
        >>> print(evaluate_segmentation({"base": model, "repaired": other}, sets.train, sets.test))
    """
    reading = reading_of(image_processor, batch_size, num_workers, strict, progress, antialias, store)
    subjects = named_subjects(models)
    learned, asked = map(_as_classes, two_dense_sets(train, test, mask_scenes, progress))
    counts: dict[tuple[str, str], list[_Array]] = {}
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    numbers: list[list[int]] = []
    for name, subject in subjects.items():
        reader = DenseReader(subject, reading, size)
        tokens = reader.draw(learned, _commonest, tokens_per_image, seed, f"{name}: training images")
        fitted = fit_classifier(tokens.features, tokens.targets, tokens.images, max_iter, tuple(inverse_penalties))
        key = name, "linear, last block"
        counts[key], read = [], []
        with closing(reader.maps(asked, f"{name}: test images")) as maps:
            for number, patches, mask in maps:
                counts[key].append(_compare(fitted, patches, mask, reader.grid))
                read.append(number)
        numbers.append(read)
        chosen[key] = {
            "C": fitted.penalty,
            "converged": fitted.converged,
            "size": list(reader.size),
            "patches": len(tokens.targets),
            "tried": [{"C": value, "accuracy": accuracy} for value, accuracy in fitted.tried],
        }
    if any(read != numbers[0] for read in numbers):
        raise ValueError("the models could read different images; give one image_processor, or strict=True")
    if not any(part[:, 2].any() for parts in counts.values() for part in parts):
        raise ValueError(f"no pixel of the {len(numbers[0])} test images has a class")
    widest = max(len(part) for parts in counts.values() for part in parts)
    summed = {
        key: np.stack([np.pad(part, ((0, widest - len(part)), (0, 0))) for part in parts])
        for key, parts in counts.items()
    }
    for key, per_image in summed.items():
        chosen[key]["per_class"] = _per_class(per_image.sum(0), classes)
    settings = {
        "classifier": "multinomial logistic regression of single patch tokens, features scaled to variance 1",
        "block": -1,
        "tokens_per_image": tokens_per_image,
        "max_iter": max_iter,
        "classes": list(classes),
        **settings_of(reading, seed),
    }
    return TaskReport(
        "segmentation",
        MEAN_IOU,
        compare_sums(summed, mean_iou, chosen, seed),
        len(learned),
        len(numbers[0]),
        settings,
        {name: describe(subject) for name, subject in subjects.items()},
        _skipped(asked, numbers[0]),
    )


def _as_classes(items: Sequence[DenseImage]) -> list[DenseImage]:
    """The same; what an array holds is looked at as what a file holds is."""
    return [item if item.convert else replace(item, convert=_array_classes) for item in items]


def _array_classes(raw: _Array) -> _Array:
    """Classes of an array; no class is below 0, whatever the mark that a library has for none, such as torch's -100."""
    return np.maximum(checked_classes(raw), IGNORED)


def _skipped(items: Sequence[DenseImage], numbers: Sequence[int]) -> tuple[str, ...]:
    read = set(numbers)
    return tuple(item.name for number, item in enumerate(items) if number not in read)


def _commonest(mask: _Array, grid: tuple[int, int]) -> tuple[_Array, _Array]:
    """The class that most pixels of each patch have, and whether at least half of them have one."""
    cells, flat = cells_of_pixels(mask, grid), mask.reshape(-1)
    places, width = grid[0] * grid[1], int(mask.max(initial=0)) + 1
    labelled = flat != IGNORED
    pixels = np.bincount(cells[labelled] * width + flat[labelled], minlength=places * width).reshape(places, width)
    return pixels.argmax(1), 2 * pixels.sum(1) >= np.bincount(cells, minlength=places)


def _compare(fitted: Fitted, patches: torch.Tensor, mask: _Array, grid: tuple[int, int]) -> _Array:
    """``(C, 3)`` counts of pixels of one image, see :func:`class_counts`."""
    known = fitted.model.classes_
    scores = fitted.model.decision_function(patches.double().numpy())
    if scores.ndim == 1:  # of two classes scikit-learn gives the difference
        scores = np.stack([-scores, scores], 1) / 2
    maps = torch.from_numpy(scores).float().T.reshape(len(known), *grid)
    predicted = np.empty(mask.shape, np.int64)
    for rows, band in enlarge(maps, (mask.shape[0], mask.shape[1])):
        predicted[rows] = known[band.argmax(0).numpy()]
    return class_counts(predicted, mask)


def class_counts(predicted: _Array, mask: _Array) -> _Array:
    """``(C, 3)`` int64: pixels in both, of the prediction, and of the mask, by class; pixels of no class count not."""
    labelled = mask != IGNORED
    guess, truth = predicted[labelled], mask[labelled]
    width = int(max(guess.max(initial=0), truth.max(initial=0))) + 1
    return np.stack(
        [np.bincount(values, minlength=width) for values in (truth[guess == truth], guess, truth)], 1
    ).astype(np.int64)


def mean_iou(sums: _Array) -> _Array:
    """Mean over classes of intersection over union, ``(k,)`` of ``(k, C, 3)`` sums of :func:`class_counts`.

    A class that is in neither prediction nor mask counts not; where there is no class at all the figure is 0.
    """
    present, iou = _iou(sums)
    mean: _Array = iou.sum(1) / present.sum(1).clip(1)
    return mean


def _iou(sums: _Array) -> tuple[_Array, _Array]:
    union = sums[..., 1] + sums[..., 2] - sums[..., 0]
    return union > 0, np.where(union > 0, sums[..., 0] / np.where(union > 0, union, 1), 0.0)


def _per_class(sums: _Array, classes: Sequence[str]) -> Mapping[str, float]:
    present, iou = _iou(sums)
    return {
        classes[number] if number < len(classes) else str(number): float(iou[number])
        for number in np.flatnonzero(present).tolist()
    }
