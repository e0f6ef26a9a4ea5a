"""Training registers with Accelerate: objectives, the loop, checkpoints, and what is saved at the end."""

from .arguments import TrainArguments
from .bases import BASES, load_base, wrap
from .callbacks import AnnealNeurons, AverageWeights, Callback
from .loop import evaluate
from .objectives import (
    OBJECTIVES,
    ClassificationObjective,
    ContrastiveObjective,
    DistillationObjective,
    NormObjective,
    Objective,
    PreservationObjective,
    RefinementObjective,
    SmoothObjective,
    Term,
    WeightedTerms,
)
from .trainer import train

__all__ = [
    "BASES",
    "OBJECTIVES",
    "AnnealNeurons",
    "AverageWeights",
    "Callback",
    "ClassificationObjective",
    "ContrastiveObjective",
    "DistillationObjective",
    "NormObjective",
    "Objective",
    "PreservationObjective",
    "RefinementObjective",
    "SmoothObjective",
    "Term",
    "TrainArguments",
    "WeightedTerms",
    "evaluate",
    "load_base",
    "train",
    "wrap",
]
