"""What registers hold, where they look, and what a model does without them."""

from .analysis import analyse_registers
from .report import RegisterReport

__all__ = ["RegisterReport", "analyse_registers"]
