"""A study of a model: does it have artifacts, what repairs it, at what cost, and which of that to take."""

from .arms import ARMS, Arm
from .choice import RULE
from .result import StudyResult
from .ruler import Figures
from .running import study
from .tasks import Accuracy, MosaicError, Task

__all__ = ["ARMS", "RULE", "Accuracy", "Arm", "Figures", "MosaicError", "StudyResult", "Task", "study"]
