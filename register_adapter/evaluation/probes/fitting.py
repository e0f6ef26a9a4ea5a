"""The probes of one set of drawn tokens: what each is fitted on, and what it gets on other images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..estimate import Estimate, mean_over_images
from ..linear_models import fit_classifier, fit_regression
from .report import COLUMNS, ProbeRow, Score
from .samples import ImageTokens, TokenSamples

__all__ = ["LOCAL", "Probing", "Task"]

Task = Literal["position", "reconstruction", "classification"]
#: Tasks that ask a token for something of its own patch.
LOCAL: tuple[Task, ...] = ("position", "reconstruction")
_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Tokens:
    """Tokens of one kind: ``(T, D)`` features, which image ``(T,)``, and what is predicted."""

    features: _Array
    images: _Array
    places: _Array
    pixels: _Array

    def __getitem__(self, part: _Array) -> _Tokens:
        return _Tokens(self.features[part], self.images[part], self.places[part], self.pixels[part])

    def __add__(self, other: _Tokens) -> _Tokens:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Tokens(*(np.concatenate(pair) for pair in pairs))


@dataclass(frozen=True)
class _Measured:
    """Figures of the test tokens one by one, the test tokens' images, and what they add up to."""

    values: _Array
    images: _Array
    score: Score


def _split(count: int, test_share: float, seed: int) -> _Array:
    """Which of the drawn images are for test, ``(images,)`` bool."""
    order = np.random.default_rng((seed, 0, 1)).permutation(count)
    num_test = min(max(round(test_share * count), 1), count - 4)
    test = np.zeros(count, bool)
    test[order[:num_test]] = True
    return test


class Probing:
    """The probes of one set of drawn tokens.

    Args:
        drawn: Tokens of the images that are used.
        samples: The draw they are from.
        tasks: What is probed.
        test_share: Share of the images for the test.
        max_iter: Iterations of the logistic regressions, at most.
        seed: Seed of the split.
    """

    def __init__(
        self,
        drawn: list[ImageTokens],
        samples: TokenSamples,
        tasks: Sequence[Task],
        test_share: float,
        max_iter: int,
        seed: int,
    ) -> None:
        self.drawn, self.samples = drawn, samples
        self.test = _split(len(drawn), test_share, seed)
        self.tasks, self.max_iter, self.seed = tasks, max_iter, seed
        self.labels = np.array([-1 if image.label is None else image.label for image in drawn])

    def rows(self, enough: bool, min_images: int, local_probe: str) -> tuple[list[ProbeRow], dict[str, Estimate]]:
        """The table's rows, and outlier minus normal.

        Args:
            enough: Whether there are outliers enough.
            min_images: Images with outliers that are needed.
            local_probe: ``"own"`` or ``"shared"``.
        """
        kinds = ("normal", "outlier") if enough else ("normal",)
        tokens = {kind: self._tokens(kind) for kind in kinds}
        measured: dict[str, dict[str, _Measured]] = {}
        rows = []
        for kind in kinds:
            train = {kind: self._training(tokens[kind]) for kind in kinds}
            learned = self._shared(train) if local_probe == "shared" and enough else train[kind]
            figures, notes = self._local(tokens[kind], learned)
            tokens_of_one = np.array([image.patches[kind][0] for image in self.drawn])
            self._classify(tokens_of_one, figures, notes)
            measured[kind] = figures
            rows.append(self._row(kind, len(tokens[kind].features), figures, notes))
        if not enough:
            samples = self.samples
            note = (
                f"not enough outlier tokens ({samples.num_outliers} found, in {samples.num_images_with_both} images; "
                f"{min_images} images with some needed)"
            )
            rows.append(ProbeRow("outlier", samples.num_images_with_both, samples.num_outliers, note=note))
        for number, name in enumerate(self.samples.layout.names):
            figures, notes = {}, ["no place and no pixels of its own"] if set(self.tasks) & set(LOCAL) else []
            self._classify(np.array([image.prefix[number] for image in self.drawn]), figures, notes)
            rows.append(self._row(name, len(self.drawn), figures, notes))
        difference = {}
        if enough:
            normal, outlier = measured["normal"], measured["outlier"]
            # Token by token: both kinds have as many tokens of the same images, in the same order.
            difference = {
                name: mean_over_images(outlier[name].values - normal[name].values, normal[name].images)
                for name in COLUMNS
                if name in normal and name in outlier
            }
        return rows, difference

    def _row(self, kind: str, count: int, figures: dict[str, _Measured], notes: list[str]) -> ProbeRow:
        notes += [
            f"{name}: the solver did not converge" for name, measured in figures.items() if not measured.score.converged
        ]
        scores: dict[str, Any] = {name: measured.score for name, measured in figures.items()}
        return ProbeRow(kind, len(self.drawn), count, **scores, note="; ".join(notes))

    def _tokens(self, kind: str) -> _Tokens:
        """All drawn patch tokens of one kind."""
        counts = [len(image.patches[kind]) for image in self.drawn]
        features = np.concatenate([image.patches[kind] for image in self.drawn])
        numbers = np.repeat(np.arange(len(self.drawn)), counts)
        places = np.concatenate([image.places[kind] for image in self.drawn])
        empty = np.zeros((len(features), 0), np.float32)
        pixels = np.concatenate([image.pixels[kind] for image in self.drawn]) if self.samples.grid else empty
        return _Tokens(features, numbers, places, pixels)

    def _training(self, tokens: _Tokens) -> _Tokens:
        return tokens[~self.test[tokens.images]]

    def _shared(self, tokens: dict[str, _Tokens]) -> _Tokens:
        """Normal tokens, and outliers in their natural proportion to them."""
        normal, outlier = tokens["normal"], tokens["outlier"]
        share = self.samples.num_outliers / self.samples.num_patches
        count = min(round(len(normal.features) * share / (1 - share)), len(outlier.features))
        chosen = np.random.default_rng((self.seed, 0, 2)).permutation(len(outlier.features))[:count]
        return normal + outlier[np.sort(chosen)]

    def _local(self, tokens: _Tokens, train: _Tokens) -> tuple[dict[str, _Measured], list[str]]:
        """Position and pixels of the test part of ``tokens``, by probes fitted on ``train``."""
        figures: dict[str, _Measured] = {}
        notes: list[str] = []
        test, grid = tokens[self.test[tokens.images]], self.samples.grid
        if "position" in self.tasks and grid is not None:
            if len(np.unique(train.places)) < 2:
                notes.append(f"position: all training tokens stand at place {train.places[0]}")
            else:
                fitted = fit_classifier(train.features, train.places, train.images, self.max_iter)
                guess, distances = fitted.predict(test.features), _distances(grid)
                common = _commonest(train.places)
                centre = int(distances[:, train.places].mean(1).argmin())
                arguments = (test.images, len(train.features), fitted.penalty, fitted.converged)
                figures["position_top1"] = _measured(guess == test.places, test.places == common, *arguments)
                figures["position_distance"] = _measured(
                    distances[guess, test.places], distances[centre, test.places], *arguments
                )
        if "reconstruction" in self.tasks and grid is not None:
            fitted = fit_regression(train.features, train.pixels, train.images)
            errors = np.linalg.norm(fitted.predict(test.features) - test.pixels, axis=1)
            mean = train.pixels.mean(0, dtype=np.float64)
            constant = np.linalg.norm(mean - test.pixels, axis=1)
            figures["reconstruction_l2"] = _measured(
                errors, constant, test.images, len(train.features), fitted.penalty, fitted.converged
            )
        return figures, notes

    def _classify(self, features: _Array, figures: dict[str, _Measured], notes: list[str]) -> None:
        """Class of the image by one token of it, ``features`` ``(images, D)``."""
        if "classification" not in self.tasks:
            return
        train, test = ~self.test, self.test
        fitted = fit_classifier(features[train], self.labels[train], np.flatnonzero(train), self.max_iter)
        hits = fitted.predict(features[test]) == self.labels[test]
        constant = self.labels[test] == _commonest(self.labels[train])
        figures["classification"] = _measured(
            hits, constant, np.flatnonzero(test), int(train.sum()), fitted.penalty, fitted.converged
        )


def _measured(
    values: _Array, constant: _Array, images: _Array, num_train: int, penalty: float, converged: bool
) -> _Measured:
    values = values.astype(np.float64)
    score = Score(
        mean_over_images(values, images), float(constant.astype(np.float64).mean()), num_train, penalty, converged
    )
    return _Measured(values, images, score)


def _commonest(classes: _Array) -> int:
    values, counts = np.unique(classes, return_counts=True)
    return int(values[counts.argmax()])


def _distances(shape: tuple[int, int]) -> _Array:
    """``(P, P)`` Euclidean distances between the places of a grid, in patches."""
    rows, columns = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
    distances: _Array = np.hypot(rows[:, None] - rows, columns[:, None] - columns)
    return distances
