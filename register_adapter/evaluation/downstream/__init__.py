"""Does it help downstream: classes, segmentation, depth and zero-shot from a model's features, beside its adapters."""

from .dense_images import DenseImage, DenseSets, distance_scenes, mask_scenes, read_depths, read_masks
from .depth import evaluate_depth
from .linear_classes import LinearFeature, evaluate_linear
from .neighbours import evaluate_knn, vote
from .reading import ImageFeatures, Reading, read_features
from .results import Metric, Score, TaskReport, TaskRow
from .segmentation import evaluate_segmentation
from .zero_shot import evaluate_zero_shot, read_classes, read_templates

__all__ = [
    "DenseImage",
    "DenseSets",
    "ImageFeatures",
    "LinearFeature",
    "Metric",
    "Reading",
    "Score",
    "TaskReport",
    "TaskRow",
    "distance_scenes",
    "evaluate_depth",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_segmentation",
    "evaluate_zero_shot",
    "mask_scenes",
    "read_classes",
    "read_depths",
    "read_features",
    "read_masks",
    "read_templates",
    "vote",
]
