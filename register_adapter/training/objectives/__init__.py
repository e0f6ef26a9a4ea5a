"""What registers are trained on, one file an objective, and the table that the command line chooses from."""

from __future__ import annotations

from .annealing import AnnealedNeurons
from .base import Batch, Objective
from .classification import ClassificationObjective

__all__ = ["OBJECTIVES", "AnnealedNeurons", "Batch", "ClassificationObjective", "Objective"]

#: Name to objective, as in ``--objective``.
OBJECTIVES: dict[str, type[Objective]] = {ClassificationObjective.name: ClassificationObjective}
