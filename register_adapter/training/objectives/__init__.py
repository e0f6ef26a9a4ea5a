"""What registers are trained on, one file an objective, and the table that the command line chooses from."""

from __future__ import annotations

from .base import Batch, Objective
from .classification import ClassificationObjective
from .contrastive import ContrastiveObjective
from .distillation import DistillationObjective
from .norm import NormObjective
from .preserve import PreservationObjective
from .refine import RefinementObjective
from .smooth import SmoothObjective
from .terms import Term, WeightedTerms

__all__ = [
    "OBJECTIVES",
    "Batch",
    "ClassificationObjective",
    "ContrastiveObjective",
    "DistillationObjective",
    "NormObjective",
    "Objective",
    "PreservationObjective",
    "RefinementObjective",
    "SmoothObjective",
    "Term",
    "WeightedTerms",
]

#: Name to objective, as in ``--objective``.
OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind
    for kind in (
        ClassificationObjective,
        DistillationObjective,
        RefinementObjective,
        SmoothObjective,
        NormObjective,
        ContrastiveObjective,
        PreservationObjective,
    )
}
