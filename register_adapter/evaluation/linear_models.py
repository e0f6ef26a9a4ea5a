"""Linear probes through scikit-learn: a classifier and a regression, their penalties chosen on training data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MissingExtraError

__all__ = ["Fitted", "fit_classifier", "fit_regression"]

_Array = npt.NDArray[Any]
#: Inverse penalties C of the classifiers, and penalties of the regressions, that are tried.
INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
PENALTIES = (1e-1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
#: Folds of the cross-validations, and tokens that C is chosen on: an accuracy of 5 % is then known to 0.9 %.
_FOLDS, _CLASSIFIER_FOLDS, _ENOUGH = 5, 3, 600


@dataclass(frozen=True)
class Fitted:
    """A fitted probe.

    Attributes:
        model: The scikit-learn pipeline: features scaled to mean 0 and variance 1 over the training tokens, then the
            linear model.
        penalty: The chosen C (classifier) or alpha (regression).
        converged: Whether the solver ended before its last iteration.
        tried: Values of C, each with its accuracy on tokens held out of the training set; empty for a regression.
        num_held_out: Number of those tokens.
    """

    model: Any
    penalty: float
    converged: bool
    tried: tuple[tuple[float, float], ...] = ()
    num_held_out: int = 0

    def predict(self, features: _Array) -> _Array:
        """``(T,)`` classes or ``(T, K)`` targets of ``(T, D)`` features."""
        predicted: _Array = self.model.predict(np.asarray(features, dtype=np.float64))
        return predicted


def fit_classifier(
    features: _Array,
    classes: _Array,
    images: _Array,
    max_iter: int = 300,
    grid: tuple[float, ...] = INVERSE_PENALTIES,
) -> Fitted:
    """Multinomial logistic regression with an L2 penalty.

    C is the value with the best accuracy in a cross-validation over images (no image is in two folds), the smallest
    such value; the model is then fitted on all tokens. With many tokens one of the three folds is enough.

    Args:
        features: ``(T, D)`` training tokens.
        classes: ``(T,)`` their classes.
        images: ``(T,)`` which image each token is from.
        max_iter: Iterations of L-BFGS at most.
        grid: The values of C, ascending.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ValueError: The training tokens are of fewer than two classes, or of a single image.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtraError("probes", "scikit-learn", "testbed") from error

    if len(np.unique(classes)) < 2:
        raise ValueError(f"a classifier needs two classes among its training tokens, found {np.unique(classes)}")
    features = np.asarray(features, dtype=np.float64)
    hits, num_held_out = np.zeros(len(grid), int), 0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the report says it
        warnings.filterwarnings("ignore", "The number of unique classes")  # places of the grid, with few tokens
        for learned, held_out in _folds(classes, images) if len(grid) > 1 else ():
            num_held_out += len(held_out)
            scaler = StandardScaler().fit(features[learned])
            fit, test = scaler.transform(features[learned]), scaler.transform(features[held_out])
            # From strong to weak penalties each fit starts where the one before ended, so that few iterations do.
            path = LogisticRegression(max_iter=max(max_iter // 6, 1), warm_start=True)
            for number, inverse in enumerate(grid):
                path.set_params(C=inverse).fit(fit, classes[learned])
                hits[number] += int((path.predict(test) == classes[held_out]).sum())
        best = grid[int(np.argmax(hits))]
        model = make_pipeline(StandardScaler(), LogisticRegression(C=best, max_iter=max_iter)).fit(features, classes)
    tried = tuple(zip(grid, (hits / num_held_out).tolist(), strict=True)) if num_held_out else ()
    return Fitted(model, best, bool((model[-1].n_iter_ < max_iter).all()), tried, num_held_out)


def _folds(classes: _Array, images: _Array) -> Iterator[tuple[_Array, _Array]]:
    """Numbers of the tokens to learn from and to choose C on, until enough were chosen on."""
    chosen_on = 0
    for learned, held_out in _splits(images, _CLASSIFIER_FOLDS):
        if chosen_on < _ENOUGH and len(np.unique(classes[learned])) > 1:
            chosen_on += len(held_out)
            yield learned, held_out


def _splits(images: _Array, folds: int) -> list[tuple[_Array, _Array]]:
    """Folds over images, at most as many as there are.

    Raises:
        ValueError: The tokens are of a single image.
    """
    from sklearn.model_selection import GroupKFold

    count = len(np.unique(images))
    if count < 2:
        raise ValueError("a probe needs training tokens of at least two images")
    return list(GroupKFold(min(folds, count)).split(images, groups=images))


def fit_regression(
    features: _Array, targets: _Array, images: _Array, folds: int = _FOLDS, grid: tuple[float, ...] = PENALTIES
) -> Fitted:
    """Ridge regression; its penalty is chosen by cross-validation over images (no image is in two folds).

    Args:
        features: ``(T, D)`` training tokens.
        targets: ``(T, K)`` what is predicted.
        images: ``(T,)`` which image each token is from.
        folds: Number of folds, at most the number of images.
        grid: The penalties.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ValueError: The tokens are of a single image.
    """
    try:
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtraError("probes", "scikit-learn", "testbed") from error

    features = np.asarray(features, dtype=np.float64)
    ridge = RidgeCV(alphas=np.asarray(grid, np.float64), cv=_splits(images, folds), scoring="neg_mean_squared_error")
    model = make_pipeline(StandardScaler(), ridge).fit(features, np.asarray(targets, dtype=np.float64))
    return Fitted(model, float(model[-1].alpha_), True)
