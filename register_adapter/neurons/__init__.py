"""Registers without training: the search for register neurons, and the fit."""

from .fit import fit_test_time_registers
from .outlier_start import start_from_outliers
from .start import Start, set_strength, start_from

__all__ = ["Start", "fit_test_time_registers", "set_strength", "start_from", "start_from_outliers"]
