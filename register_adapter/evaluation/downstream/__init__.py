"""Does it help downstream: classes, segmentation, depth and zero-shot from a model's features, beside its adapters."""

from .linear_classes import LinearFeature, evaluate_linear
from .neighbours import evaluate_knn, vote
from .reading import ImageFeatures, Reading, read_features
from .results import Metric, Score, TaskReport, TaskRow

__all__ = [
    "ImageFeatures",
    "LinearFeature",
    "Metric",
    "Reading",
    "Score",
    "TaskReport",
    "TaskRow",
    "evaluate_knn",
    "evaluate_linear",
    "read_features",
    "vote",
]
