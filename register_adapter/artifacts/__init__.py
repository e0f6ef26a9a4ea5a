"""Finding artifacts: patch tokens of outlying norm."""

from .artifact_report import ArtifactReport, LayerReport
from .audit import audit
from .cut import Cut
from .norms import NormSummary, neighbour_similarity, patch_norms, summarise_norms
from .rules import RULES, apply_rule, resolve_rule
from .statistics import Statistics, collect_statistics

__all__ = [
    "RULES",
    "ArtifactReport",
    "Cut",
    "LayerReport",
    "NormSummary",
    "Statistics",
    "apply_rule",
    "audit",
    "collect_statistics",
    "neighbour_similarity",
    "patch_norms",
    "resolve_rule",
    "summarise_norms",
]
