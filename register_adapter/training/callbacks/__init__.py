"""What changes during a run, apart from the loss, and what watches over it."""

from __future__ import annotations

from .average import AverageWeights
from .base import Callback
from .guard import LossGuard
from .means import RunningMeans
from .neurons import AnnealNeurons
from .watch import WatchArtifacts

__all__ = ["AnnealNeurons", "AverageWeights", "Callback", "LossGuard", "RunningMeans", "WatchArtifacts"]
