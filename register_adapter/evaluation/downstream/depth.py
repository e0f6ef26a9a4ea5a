"""Depth by a linear layer on patch tokens: the expectation over bins, or ridge regression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ...features.subjects import Subjects, keeping_adapters, named_subjects
from ..linear_models import PENALTIES, fit_regression
from .classifying import device_of, reading_of, settings_of
from .dense import DenseReader, DrawnTokens, cells_of_pixels, enlarge, two_dense_sets
from .dense_images import distance_scenes
from .reading import describe
from .results import Metric, TaskReport, compare_means

__all__ = ["evaluate_depth", "root_mean_squared_error"]

_Array = npt.NDArray[Any]
Head = Literal["bins", "ridge"]
RMSE = Metric(
    "rmse",
    "root of the mean squared error over the pixels of an image that have a depth, its mean over the test images",
    percent=False,
    higher_is_better=False,
)
#: Penalties of the head of bins that are tried, strong ones first.
WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)


@keeping_adapters
def evaluate_depth(
    models: Subjects,
    train: Any,
    test: Any,
    *,
    head: Head = "bins",
    bins: int = 256,
    size: int | tuple[int, int] | None = None,
    tokens_per_image: int = 100,
    penalties: Sequence[float] | None = None,
    max_iter: int = 20,
    image_processor: Any = None,
    batch_size: int = 16,
    num_workers: int = 2,
    strict: bool = False,
    antialias: bool = True,
    store: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> TaskReport:
    """Root mean squared error of depths that a linear layer reads from single patch tokens.

    The head of bins is DINOv2's: evenly spaced depths, of which the layer's softmax makes the expectation. It is fitted
    by the squared error to the mean depth of each patch, and enlarged to the image (bilinear). Its penalty is chosen on
    a fifth of the training images; the head is then fitted on all of them.

    Args:
        models: See :func:`~register_adapter.evaluation.evaluate_knn`, as for what is not listed here.
        train: From :func:`~register_adapter.evaluation.downstream.read_depths`, a
            :class:`~register_adapter.testbed.SceneDataset` (distances to the nearest shape, in sides of the image), or
            pairs of an image and its depths ``(H, W)`` float, with NaN for pixels without one.
        test: The same.
        head: ``"bins"`` or ``"ridge"``, a regression that is quicker to fit.
        bins: Number of bins, from the smallest to the largest depth of the training patches.
        size: A side or ``(height, width)`` in pixels; ``None`` takes the image processor's or the model's.
        tokens_per_image: Patches of a training image that are learned from, at random; 100,000 of all at most.
        penalties: Penalties that are tried: weight decays, descending, or those of the ridge regression; ``None`` takes
            the head's own.
        max_iter: Iterations of L-BFGS for each weight decay, at most; the ridge regression has none.
        image_processor: Only its size and how it normalises is used.
        batch_size: Images in one pass.
        num_workers: Threads that read images.
        strict: Refuse bad images.
        antialias: Interpolate position embeddings with antialiasing.
        store: Folder for the patch tokens; ``None`` keeps none.
        seed: Seed of draws and of the bootstrap.
        progress: Show progress bars.

    Raises:
        ValueError: As for :func:`~register_adapter.evaluation.evaluate_segmentation`; or ``head`` ``bins`` or
            ``penalties`` is out of range.
        ImageFileError: No image is good, or one is bad and may not be.
        UnsupportedModelError: The model has no vision tower, or places of its patches are not known.
        MissingExtraError: scikit-learn is not installed.
    """
    if head not in _HEADS:
        raise ValueError(f"head={head!r}, expected one of {', '.join(_HEADS)}")
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    if penalties is not None and not (penalties and min(penalties) > 0):
        raise ValueError(f"penalties must be numbers above 0, got {list(penalties)}")
    fit = partial(_HEADS[head], bins=bins, seed=seed, penalties=penalties, max_iter=max_iter)
    reading = reading_of(image_processor, batch_size, num_workers, strict, progress, antialias, store)
    subjects = named_subjects(models)
    learned, asked = two_dense_sets(train, test, distance_scenes, progress)
    values: dict[tuple[str, str], list[float]] = {}
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    numbers: list[list[int]] = []
    for name, subject in subjects.items():
        reader = DenseReader(subject, reading, size)
        tokens = reader.draw(learned, _means, tokens_per_image, seed, f"{name}: training images")
        fitted = fit(tokens, device=device_of(subject))
        key = name, f"{head}, last block"
        values[key], read = [], []
        with closing(reader.maps(asked, f"{name}: test images")) as maps:
            for number, patches, depths in maps:
                small = fitted.predict(patches).reshape(1, *reader.grid)
                predicted = np.concatenate([band[0].numpy() for _, band in enlarge(small, depths.shape)])
                if np.isfinite(depths).any():
                    values[key].append(root_mean_squared_error(predicted, depths))
                    read.append(number)
        numbers.append(read)
        chosen[key] = {**fitted.chosen, "size": list(reader.size), "patches": len(tokens.targets)}
    if any(read != numbers[0] for read in numbers) or not numbers[0]:
        raise ValueError("the models could read different images, or none has a depth; give one image_processor")
    settings = {
        "head": head,
        "block": -1,
        "tokens_per_image": tokens_per_image,
        **(
            {"bins": bins, "max_iter": max_iter, "loss": "squared error of the softmax's expectation"}
            if head == "bins"
            else {}
        ),
        **settings_of(reading, seed),
    }
    left_out = set(range(len(asked))) - set(numbers[0])
    return TaskReport(
        "depth",
        RMSE,
        compare_means(values, chosen, seed),
        len(learned),
        len(numbers[0]),
        settings,
        {name: describe(subject) for name, subject in subjects.items()},
        tuple(asked[number].name for number in sorted(left_out)),
    )


def root_mean_squared_error(predicted: _Array, depths: _Array) -> float:
    """Over the pixels of an image that have a depth.

    Raises:
        ValueError: None has.
    """
    valid = np.isfinite(depths)
    if not valid.any():
        raise ValueError("no pixel has a depth")
    return float(np.sqrt(np.square(predicted[valid].astype(np.float64) - depths[valid]).mean()))


def _means(depths: _Array, grid: tuple[int, int]) -> tuple[_Array, _Array]:
    """The mean depth of each patch, and whether at least half of its pixels have one."""
    cells, flat = cells_of_pixels(depths, grid), depths.reshape(-1)
    places, valid = grid[0] * grid[1], np.isfinite(flat)
    count = np.bincount(cells[valid], minlength=places)
    sums = np.bincount(cells[valid], weights=flat[valid], minlength=places)
    return sums / count.clip(1), (count > 0) & (2 * count >= np.bincount(cells, minlength=places))


class _Fitted(NamedTuple):
    """From tokens ``(P, D)`` to depths ``(P,)``, and what was chosen."""

    predict: Callable[[torch.Tensor], torch.Tensor]
    chosen: dict[str, Any]


def _fit_ridge(
    tokens: DrawnTokens, *, bins: int, seed: int, penalties: Sequence[float] | None, max_iter: int, device: torch.device
) -> _Fitted:
    grid = PENALTIES if penalties is None else tuple(penalties)
    fitted = fit_regression(tokens.features, tokens.targets[:, None], tokens.images, grid=grid)

    def predict(patches: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(fitted.predict(patches.numpy())).float().reshape(-1)

    return _Fitted(predict, {"alpha": fitted.penalty})


def _fit_bins(
    tokens: DrawnTokens, *, bins: int, seed: int, penalties: Sequence[float] | None, max_iter: int, device: torch.device
) -> _Fitted:
    features = torch.from_numpy(tokens.features).to(device)
    targets = torch.from_numpy(tokens.targets).float().to(device)
    mean, deviation = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    features = (features - mean) / deviation
    centres = torch.linspace(float(targets.min()), float(targets.max()), bins, device=device)
    images = np.unique(tokens.images)
    if len(images) < 2:
        raise ValueError("a head needs training patches of at least two images")
    held = np.random.default_rng((seed, 1)).permutation(images)[: max(1, len(images) // 5)]
    out = torch.from_numpy(np.isin(tokens.images, held)).to(device)
    tried: list[dict[str, float]] = []
    weight = None
    for decay in (
        WEIGHT_DECAYS if penalties is None else penalties
    ):  # each fit starts where the one before ended, so that few iterations do
        weight = _optimise(features[~out], targets[~out], centres, decay, weight, max_iter)
        error = (_expectation(features[out], weight, centres) - targets[out]).square().mean().sqrt()
        tried.append({"weight_decay": decay, "rmse": float(error)})
    best = min(tried, key=lambda entry: entry["rmse"])["weight_decay"]
    last = _optimise(features, targets, centres, best, weight, max_iter)

    def predict(patches: torch.Tensor) -> torch.Tensor:
        return _expectation((patches.to(device) - mean) / deviation, last, centres).cpu()

    chosen = {"weight_decay": best, "held_out": len(held), "tried": tried}
    return _Fitted(predict, {**chosen, "depths": [float(centres[0]), float(centres[-1])]})


def _expectation(features: torch.Tensor, weight: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Depths ``(T,)`` of tokens ``(T, D)`` by a layer ``(D + 1, bins)``, the bias last."""
    return (features @ weight[:-1] + weight[-1]).softmax(1) @ centres


def _optimise(
    features: torch.Tensor,
    targets: torch.Tensor,
    centres: torch.Tensor,
    decay: float,
    start: torch.Tensor | None,
    max_iter: int,
) -> torch.Tensor:
    """The layer ``(D + 1, bins)`` of the least squared error, in units of the targets' variance, plus the penalty."""
    if start is None:
        start = torch.zeros(features.shape[1] + 1, len(centres), device=features.device)
        # Not the same for every bin: then the layer would stay where it is.
        start[-1] = -((centres - targets.mean()) / targets.std().clamp_min(1e-6)).square() / 2
    weight = start.clone().requires_grad_()
    scale = targets.var().clamp_min(1e-12)
    optimiser = torch.optim.LBFGS([weight], max_iter=max_iter, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        error = (_expectation(features, weight, centres) - targets).square().mean() / scale
        loss = error + decay * weight[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach()


_HEADS: dict[str, Callable[..., _Fitted]] = {"bins": _fit_bins, "ridge": _fit_ridge}
