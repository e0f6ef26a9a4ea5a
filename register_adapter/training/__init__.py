"""Training registers with Accelerate: objectives, the loop, checkpoints, and what is saved at the end."""

from .arguments import TrainArguments
from .loop import evaluate
from .objectives import OBJECTIVES, ClassificationObjective, Objective
from .trainer import train

__all__ = ["OBJECTIVES", "ClassificationObjective", "Objective", "TrainArguments", "evaluate", "train"]
