"""Does it help downstream: classes, segmentation, depth and zero-shot from a model's features, beside its adapters."""

from .dense_images import DenseImage, DenseSets, distance_scenes, mask_scenes, read_depths, read_masks
from .depth import evaluate_depth
from .linear_classes import LinearFeature, evaluate_linear
from .neighbours import evaluate_knn, vote
from .reading import ImageFeatures, Reading, describe, read_features
from .results import Metric, Score, TaskReport, TaskRow
from .samples import LabelledImages, label_images
from .segmentation import evaluate_segmentation
from .zero_shot import TEMPLATES, evaluate_zero_shot, read_classes, read_templates

__all__ = [
    "TEMPLATES",
    "DenseImage",
    "DenseSets",
    "ImageFeatures",
    "LabelledImages",
    "LinearFeature",
    "Metric",
    "Reading",
    "Score",
    "TaskReport",
    "TaskRow",
    "describe",
    "distance_scenes",
    "evaluate_depth",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_segmentation",
    "evaluate_zero_shot",
    "label_images",
    "mask_scenes",
    "read_classes",
    "read_depths",
    "read_features",
    "read_masks",
    "read_templates",
    "vote",
]
