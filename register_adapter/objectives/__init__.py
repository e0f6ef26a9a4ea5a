"""What registers are trained on, one file an objective, and the table that the command line chooses from."""

from __future__ import annotations

from .base import Batch, Objective
from .classification import ClassificationObjective

__all__ = ["OBJECTIVES", "Batch", "ClassificationObjective", "Objective"]

#: Name to objective, as in ``--objective``.
OBJECTIVES: dict[str, type[Objective]] = {ClassificationObjective.name: ClassificationObjective}
