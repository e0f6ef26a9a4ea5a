"""What tokens know and what registers do, with figures and how sure they are."""

from .discovery import DiscoveryReport, discover, evaluate_discovery
from .downstream import (
    TaskReport,
    evaluate_depth,
    evaluate_knn,
    evaluate_linear,
    evaluate_segmentation,
    evaluate_zero_shot,
)
from .estimate import Estimate
from .probes import ProbeReport, probe_tokens
from .registers import RegisterReport, analyse_registers

__all__ = [
    "DiscoveryReport",
    "Estimate",
    "ProbeReport",
    "RegisterReport",
    "TaskReport",
    "analyse_registers",
    "discover",
    "evaluate_depth",
    "evaluate_discovery",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_segmentation",
    "evaluate_zero_shot",
    "probe_tokens",
]
