"""Finding artifacts: patch tokens of outlying norm."""

from .artifact_report import ArtifactReport, LayerReport
from .audit import audit
from .cut import Cut
from .detector import AttentionDetector
from .detector_training import train_detector
from .norms import NormSummary, neighbour_similarity, patch_norms, summarise_norms
from .probe_report import ProbeReport
from .probes import probe_tokens
from .register_analysis import analyse_registers
from .register_report import RegisterReport
from .rules import RULES, apply_rule, resolve_rule
from .statistics import Statistics, collect_statistics

__all__ = [
    "RULES",
    "ArtifactReport",
    "AttentionDetector",
    "Cut",
    "LayerReport",
    "NormSummary",
    "ProbeReport",
    "RegisterReport",
    "Statistics",
    "analyse_registers",
    "apply_rule",
    "audit",
    "collect_statistics",
    "neighbour_similarity",
    "patch_norms",
    "probe_tokens",
    "resolve_rule",
    "summarise_norms",
    "train_detector",
]
