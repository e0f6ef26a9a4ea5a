"""Linear classifiers of images on frozen features: CLS, CLS and the patches' mean, of the last block or of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from ...features.layout import tower_of
from ...features.subjects import Subjects, keeping_adapters, named_subjects
from ..linear_models import INVERSE_PENALTIES, fit_classifier
from .classifying import ACCURACY, common_settings, read_sets, reading_of
from .reading import ImageFeatures
from .results import TaskReport, compare_means

__all__ = ["LinearFeature", "evaluate_linear", "linear_vectors"]


class LinearFeature(NamedTuple):
    """What a linear classifier is given, as in DINOv2's evaluation.

    Attributes:
        blocks: CLS tokens of so many last blocks, side by side.
        patch_mean: And the mean of the last block's patch tokens. A model without CLS has the means of all these
            blocks' patches in any case.
    """

    blocks: int = 1
    patch_mean: bool = False

    def name(self, with_cls: bool) -> str:
        """Words for it."""
        tokens = "patch mean" if not with_cls else "CLS + patch mean" if self.patch_mean else "CLS"
        return f"{tokens}, last {'block' if self.blocks == 1 else f'{self.blocks} blocks'}"


FEATURES = tuple(LinearFeature(blocks, patch_mean) for blocks in (1, 4) for patch_mean in (False, True))


@keeping_adapters
def evaluate_linear(
    models: Subjects,
    train: Any,
    test: Any,
    *,
    features: Sequence[LinearFeature] = FEATURES,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
    max_iter: int = 300,
    image_processor: Any = None,
    batch_size: int = 32,
    num_workers: int = 2,
    strict: bool = False,
    antialias: bool = False,
    store: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> TaskReport:
    """Top-1 accuracy of multinomial logistic regressions (scikit-learn) on frozen features, scaled to variance 1.

    The penalty is the one of the best accuracy on a held-out third of the training images (three-fold where there are
    few), the strongest of equal ones; the classifier is then fitted on all of them. Every value that was tried is in
    the row, with its accuracy.

    Args:
        models: See :func:`~register_adapter.evaluation.evaluate_knn`, as for all arguments that are not listed here.
        train: Labelled images.
        test: Labelled images.
        features: What classifiers are given, a row each; blocks that a model does not have are left out.
        inverse_penalties: Values of C that are tried, ascending.
        max_iter: Iterations of L-BFGS, at most.
        image_processor: Image processor.
        batch_size: Images in one pass.
        num_workers: Threads that read images.
        strict: Refuse bad images.
        antialias: Interpolate position embeddings with antialiasing.
        store: Folder for the features.
        seed: Seed of the bootstrap.
        progress: Show progress bars.

    Raises:
        ValueError: See :func:`~register_adapter.evaluation.evaluate_knn`; or the training images are of one class.
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> print(evaluate_linear({"base": (model, None), "repaired": (model, "default")}, "train/", "test/"))
    """
    reading = reading_of(image_processor, batch_size, num_workers, strict, progress, antialias, store)
    subjects = named_subjects(models)
    if not features or min(feature.blocks for feature in features) < 1:
        raise ValueError(f"features must be LinearFeature of at least one block, got {tuple(features)}")
    deepest = min(_blocks(subject) for subject in subjects.values())
    kept = [feature for feature in features if feature.blocks <= deepest]
    if not kept:
        raise ValueError(f"features of {features[0].blocks} blocks, and a model has {deepest}")
    sets = read_sets(subjects, train, test, blocks=max(feature.blocks for feature in kept), reading=reading)
    hits: dict[tuple[str, str], npt.NDArray[Any]] = {}
    chosen: dict[tuple[str, str], Mapping[str, Any]] = {}
    images = np.arange(len(sets.train_labels))
    with tqdm(total=len(kept) * len(subjects), desc="classifiers", disable=not progress) as bar:
        for name, (learned, asked) in sets.features.items():
            for feature in kept:
                key = name, feature.name(learned.cls is not None)
                bar.update()
                if key in hits:  # without CLS two of the features are one
                    continue
                fitted = fit_classifier(
                    linear_vectors(learned, feature), sets.train_labels, images, max_iter, tuple(inverse_penalties)
                )
                hits[key] = fitted.predict(linear_vectors(asked, feature)) == sets.test_labels
                chosen[key] = {
                    "C": fitted.penalty,
                    "converged": fitted.converged,
                    "held_out": fitted.num_held_out,
                    "tried": [{"C": value, "accuracy": accuracy} for value, accuracy in fitted.tried],
                }
    settings = {
        "classifier": "multinomial logistic regression, L2 penalty, features scaled to mean 0 and variance 1",
        "max_iter": max_iter,
        **common_settings(reading, sets, seed),
    }
    left_out = sorted({feature.blocks for feature in features} - {feature.blocks for feature in kept})
    notes = sets.notes + [f"a model has {deepest} blocks: nothing of the last {number}" for number in left_out]
    return TaskReport(
        "linear",
        ACCURACY,
        compare_means(hits, chosen, seed),
        len(sets.train_labels),
        len(sets.test_labels),
        settings,
        sets.models,
        sets.skipped,
        tuple(notes),
    )


def _blocks(subject: Any) -> int:
    return len(tower_of(subject[0] if isinstance(subject, tuple) else subject)[0].part("blocks"))


def linear_vectors(features: ImageFeatures, feature: LinearFeature) -> npt.NDArray[np.float32]:
    """``(n, F)``: what a classifier is given of each image.

    Args:
        features: With at least ``feature.blocks`` blocks.
        feature: What is taken of them.
    """
    if features.cls is None:
        parts = [features.mean[:, -feature.blocks :].flatten(1)]
    else:
        parts = [features.cls[:, -feature.blocks :].flatten(1)]
        parts += [features.mean[:, -1]] if feature.patch_mean else []
    vectors: npt.NDArray[np.float32] = torch.cat(parts, 1).numpy()
    return vectors
