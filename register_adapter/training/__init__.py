"""Training registers with Accelerate: objectives, the loop, checkpoints, and what is saved at the end."""

from .arguments import TrainArguments
from .objectives import OBJECTIVES, ClassificationObjective, Objective
from .trainer import evaluate, train

__all__ = ["OBJECTIVES", "ClassificationObjective", "Objective", "TrainArguments", "evaluate", "train"]
