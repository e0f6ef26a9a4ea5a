"""k-nearest-neighbour classification of images by their features, as in DINOv2's evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...features.subjects import Subjects, keeping_adapters, named_subjects
from .classifying import ACCURACY, TwoSets, common_settings, device_of, read_sets, reading_of
from .reading import ImageFeatures
from .results import TaskReport, compare_means

__all__ = ["evaluate_knn", "vote"]

Feature = Literal["auto", "cls", "mean", "cls+mean"]
#: Memory for the similarities of a chunk, in bytes; features themselves are not counted.
BUDGET = 2**28
#: The smallest temperature: cosines over it are numbers of float32.
_LEAST = 1e-30


@keeping_adapters
def evaluate_knn(
    models: Subjects,
    train: Any,
    test: Any,
    *,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    feature: Feature = "auto",
    image_processor: Any = None,
    batch_size: int = 32,
    num_workers: int = 2,
    strict: bool = False,
    antialias: bool = False,
    store: Any = None,
    budget: int = BUDGET,
    seed: int = 0,
    progress: bool = False,
) -> TaskReport:
    """Top-1 accuracy of a vote of the k most similar training images, with no training at all.

    As in DINOv2's evaluation similarities are cosines, and a neighbour's vote weighs exp(similarity / temperature).

    Args:
        models: One model, or several by name, the first of which is the base of the comparison: ``{"base": model,
            ...}``. One adapter of a PEFT model is the pair ``(model, "adapter's name")``, the model with its adapters
            disabled ``(model, None)``; a single PEFT model with registers stands for its base and each of its adapters.
        train: Labelled images: a folder with one sub-folder per class, a data set with ``"image"`` and ``"label"``, or
            a pair of images and labels.
        test: The same; a folder may lack classes.
        k: Numbers of neighbours; those beyond the number of training images are left out, and the report says so.
        temperature: See above.
        feature: ``"cls"``, ``"mean"`` of the patches, or both side by side ``"cls+mean"``, behind the final LayerNorm;
            ``"auto"`` takes CLS where all models have one.
        image_processor: Of transformers, or a function from a PIL image to ``(3, H, W)``; ``None`` looks up the
            model's own.
        batch_size: Images in one pass.
        num_workers: Threads that read images.
        strict: Refuse bad images instead of skipping them with a warning.
        antialias: Interpolate position embeddings with antialiasing.
        store: Folder for the features, which are computed once; ``None`` keeps them in memory only.
        budget: Bytes that similarities may take at a time.
        seed: Seed of the bootstrap.
        progress: Show progress bars.

    Raises:
        ValueError: A set is empty or not labelled, an image is in both, images have several resolutions, ``k`` or
            ``temperature`` is out of range, or the model has no CLS.
        ImageFileError: No image is good, or one is bad and may not be.
        UnsupportedModelError: The model has no vision tower, or places of its patches are not known.

    Example:
        >>> print(evaluate_knn({"base": (model, None), "repaired": (model, "default")}, "train/", "test/"))
    """
    if isinstance(k, int | str) or not k or not all(isinstance(number, Integral) and int(number) > 0 for number in k):
        raise ValueError(f"k must be numbers of neighbours, at least 1, such as (10, 20), got {k!r}")
    # Similarities are divided by it in float32; JSON has no infinity.
    if not _LEAST <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least {_LEAST:.0e}, got {temperature}")
    if feature not in _FEATURES:
        raise ValueError(f"feature={feature!r}, expected one of {', '.join(_FEATURES)}")
    reading = reading_of(image_processor, batch_size, num_workers, strict, progress, antialias, store)
    subjects = named_subjects(models)
    sets = read_sets(subjects, train, test, blocks=1, reading=reading)
    chosen_feature = _choose_feature(feature, sets)
    numbers = sorted({number for number in k if number <= len(sets.train_labels)})
    fewer = [] if len(numbers) == len(set(k)) else [f"{len(sets.train_labels)} training images: no larger k"]
    if not numbers:
        raise ValueError(f"{len(sets.train_labels)} training images, and the smallest k is {min(k)}")
    hits, chosen = {}, {}
    for name, (learned, asked) in sets.features.items():
        votes = vote(
            _vectors(learned, chosen_feature),
            sets.train_labels,
            _vectors(asked, chosen_feature).to(device_of(subjects[name])),
            k=numbers,
            temperature=temperature,
            num_classes=len(sets.classes),
            budget=budget,
            progress=progress,
            title=f"{name}: neighbours",
        )
        for number in numbers:
            key = name, f"k = {number}"
            hits[key] = votes[number].argmax(1) == sets.test_labels
            chosen[key] = {"k": number}
    settings = {
        "feature": chosen_feature,
        "block": -1,
        "temperature": temperature,
        "similarity": "cosine",
        **common_settings(reading, sets, seed),
    }
    return TaskReport(
        "knn",
        ACCURACY,
        compare_means(hits, chosen, seed),
        len(sets.train_labels),
        len(sets.test_labels),
        settings,
        sets.models,
        sets.skipped,
        (*sets.notes, *fewer),
    )


def _cls(features: ImageFeatures) -> torch.Tensor:
    assert features.cls is not None
    return features.cls[:, -1]


_FEATURES: dict[str, Any] = {
    "auto": None,
    "cls": _cls,
    "mean": lambda features: features.mean[:, -1],
    "cls+mean": lambda features: torch.cat([_cls(features), features.mean[:, -1]], 1),
}


def _vectors(features: ImageFeatures, feature: str) -> torch.Tensor:
    vectors: torch.Tensor = _FEATURES[feature](features)
    return vectors


def _choose_feature(feature: str, sets: TwoSets) -> str:
    without = [name for name, (learned, _) in sets.features.items() if learned.cls is None]
    if feature == "auto":
        return "mean" if without else "cls"
    if without and feature != "mean":
        raise ValueError(f"{without[0]} has no CLS token, so feature={feature!r} is not there; use 'mean' or 'auto'")
    return feature


def vote(
    train: torch.Tensor,
    labels: npt.ArrayLike,
    queries: torch.Tensor,
    *,
    k: Sequence[int],
    temperature: float = 0.07,
    num_classes: int | None = None,
    budget: int = BUDGET,
    progress: bool = False,
    title: str = "neighbours",
) -> dict[int, npt.NDArray[np.float32]]:
    """Shares of the vote of each class, for every k, from similarities that are computed in chunks.

    The training features are gone through once. Beside them and the queries there are never more similarities than fit
    into the budget, and of each query the ``max(k)`` nearest so far.

    Args:
        train: ``(n, D)`` features, of any length; they are normalised chunk by chunk.
        labels: ``(n,)`` int, the classes of the training images.
        queries: ``(q, D)`` features, on the device where similarities are computed.
        k: Numbers of neighbours, at most n.
        temperature: A neighbour's vote weighs exp(cosine / temperature).
        num_classes: Number C of classes; ``None``: up to the largest label.
        budget: Bytes of one chunk's similarities and what is sorted of them.
        progress: Show a progress bar.
        title: What it is called.

    Returns:
        ``(q, C)`` float32 for each k, rows that sum to 1.

    Raises:
        ValueError: There are fewer training images than k, the budget does not hold a query's neighbours, or a feature
            is not finite.
    """
    classes = torch.as_tensor(np.asarray(labels), dtype=torch.long)
    most = max(k)
    if most > len(train) or len(train) != len(classes):
        raise ValueError(f"k={most} of {len(train)} training images with {len(classes)} labels")
    rows, columns = chunk_sizes(len(queries), len(train), most, train.shape[1], budget)
    _refuse_not_finite("queries", queries)
    best = torch.full((len(queries), most), -torch.inf, device=queries.device)
    nearest = torch.zeros((len(queries), most), dtype=torch.int32, device=queries.device)
    with tqdm(total=len(train), desc=title, unit="image", disable=not progress) as bar:
        for start in range(0, len(train), columns):
            _refuse_not_finite("train", train[start : start + columns])
            part = F.normalize(train[start : start + columns].to(queries.device, torch.float32), dim=1)
            count = min(most, len(part))
            for first in range(0, len(queries), rows):
                here = slice(first, first + rows)
                asked = F.normalize(queries[here].float(), dim=1)
                values, places = (asked @ part.T).topk(count, dim=1)
                both = torch.cat([best[here], values], 1)
                numbers = torch.cat([nearest[here], (places + start).int()], 1)
                best[here], order = both.topk(most, dim=1)
                nearest[here] = numbers.gather(1, order)
            bar.update(len(part))
    return _votes(best.cpu(), classes[nearest.cpu().long()], k, temperature, num_classes or int(classes.max()) + 1)


def _refuse_not_finite(name: str, features: torch.Tensor) -> None:
    if not bool(features.isfinite().all()):
        broken = int((~features.isfinite().all(1)).sum())
        raise ValueError(f"{name} has NaN or infinity in {broken} of {len(features)} rows, which are near to nothing")


def _votes(
    similarities: torch.Tensor, classes: torch.Tensor, k: Sequence[int], temperature: float, num_classes: int
) -> dict[int, npt.NDArray[np.float32]]:
    """From ``(q, max k)`` similarities, largest first, and the neighbours' classes."""
    votes = {}
    for number in k:
        weights = (similarities[:, :number] / temperature).softmax(1)
        shares = torch.zeros(len(weights), num_classes).scatter_add_(1, classes[:, :number], weights)
        votes[number] = shares.numpy()
    return votes


def chunk_sizes(queries: int, train: int, most: int, width: int, budget: int) -> tuple[int, int]:
    """Queries and training images of one chunk.

    Each similarity takes 4 bytes, each chunk's normalised vectors 4 a value, and what is merged of a query about 40 a
    neighbour; twice that, for what operations need meanwhile.

    Raises:
        ValueError: The budget is too small for one query.
    """
    columns = max(most, min(train, budget // (8 * (width + 64))))
    rows = (budget - 8 * columns * width) // (8 * (columns + width + 10 * most))
    while rows < 64 and columns > most:
        columns = max(most, columns // 2)
        rows = (budget - 8 * columns * width) // (8 * (columns + width + 10 * most))
    if rows < 1:
        least = 8 * most * width + 8 * (11 * most + width)
        raise ValueError(f"budget={budget} bytes is too small; one query with k={most} needs {least}")
    return min(queries, rows), min(train, columns)
