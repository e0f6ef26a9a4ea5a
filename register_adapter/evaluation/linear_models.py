"""Linear probes through scikit-learn: a classifier and a regression, their penalties chosen on training data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MissingExtraError

__all__ = ["Fitted", "fit_classifier", "fit_regression"]

_Array = npt.NDArray[Any]
#: Inverse penalties C of the classifiers, and penalties of the regressions, that are tried.
INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
PENALTIES = (1e-1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)


@dataclass(frozen=True)
class Fitted:
    """A fitted probe.

    Attributes:
        model: The scikit-learn pipeline: features scaled to mean 0 and variance 1 over the training tokens, then the
            linear model.
        penalty: The chosen C (classifier) or alpha (regression).
        converged: Whether the solver ended before its last iteration.
    """

    model: Any
    penalty: float
    converged: bool

    def predict(self, features: _Array) -> _Array:
        """``(T,)`` classes or ``(T, K)`` targets of ``(T, D)`` features."""
        predicted: _Array = self.model.predict(np.asarray(features, dtype=np.float64))
        return predicted


def fit_classifier(
    features: _Array,
    classes: _Array,
    held_out: _Array,
    max_iter: int = 300,
    grid: tuple[float, ...] = INVERSE_PENALTIES,
) -> Fitted:
    """Multinomial logistic regression with an L2 penalty.

    C is the value with the best accuracy on the held-out part of the training tokens, the smallest such value; the
    model is then fitted on all of them.

    Args:
        features: ``(T, D)`` training tokens.
        classes: ``(T,)`` their classes.
        held_out: ``(T,)`` bool, the part that C is chosen on.
        max_iter: Iterations of L-BFGS at most.
        grid: The values of C, ascending.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ValueError: The training tokens are of fewer than two classes.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtraError("probes", "scikit-learn", "testbed") from error

    if len(np.unique(classes[~held_out])) < 2:
        raise ValueError(f"a classifier needs two classes among its training tokens, found {np.unique(classes)}")
    features = np.asarray(features, dtype=np.float64)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the report says it
        warnings.filterwarnings("ignore", "The number of unique classes")  # places of the grid, with few tokens
        best = grid[0]
        if len(grid) > 1 and held_out.any():
            scaler = StandardScaler().fit(features[~held_out])
            fit, test = scaler.transform(features[~held_out]), scaler.transform(features[held_out])
            # From strong to weak penalties each fit starts where the one before ended.
            path = LogisticRegression(max_iter=max_iter, warm_start=True)
            accuracies = [
                path.set_params(C=inverse).fit(fit, classes[~held_out]).score(test, classes[held_out])
                for inverse in grid
            ]
            best = grid[int(np.argmax(accuracies))]
        model = make_pipeline(StandardScaler(), LogisticRegression(C=best, max_iter=max_iter)).fit(features, classes)
    return Fitted(model, best, bool((model[-1].n_iter_ < max_iter).all()))


def fit_regression(
    features: _Array, targets: _Array, images: _Array, folds: int = 5, grid: tuple[float, ...] = PENALTIES
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
        from sklearn.model_selection import GroupKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtraError("probes", "scikit-learn", "testbed") from error

    features = np.asarray(features, dtype=np.float64)
    count = len(np.unique(images))
    if count < 2:
        raise ValueError("a regression needs tokens of at least two images")
    splits = list(GroupKFold(min(folds, count)).split(features, groups=images))
    ridge = RidgeCV(alphas=grid, cv=splits, scoring="neg_mean_squared_error")
    model = make_pipeline(StandardScaler(), ridge).fit(features, np.asarray(targets, dtype=np.float64))
    return Fitted(model, float(model[-1].alpha_), True)
