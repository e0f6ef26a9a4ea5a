"""Finding artifacts: patch tokens of outlying norm."""

from .auditing import audit
from .detector import AttentionDetector, train_detector
from .norms import NormSummary, neighbour_similarity, patch_norms, summarise_norms
from .report import ArtifactReport, LayerReport
from .rules import RULES, Threshold, apply_rule, resolve_rule
from .sink_report import HeadSinks, SinkReport, SinkRow, Sinks
from .statistics import Statistics, collect_statistics

__all__ = [
    "RULES",
    "ArtifactReport",
    "AttentionDetector",
    "HeadSinks",
    "LayerReport",
    "NormSummary",
    "SinkReport",
    "SinkRow",
    "Sinks",
    "Statistics",
    "Threshold",
    "apply_rule",
    "audit",
    "collect_statistics",
    "neighbour_similarity",
    "patch_norms",
    "resolve_rule",
    "summarise_norms",
    "train_detector",
]
