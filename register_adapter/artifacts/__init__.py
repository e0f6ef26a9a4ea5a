"""Finding artifacts: patch tokens of outlying norm."""

from .norms import NormSummary, neighbour_similarity, patch_norms, summarise_norms

__all__ = ["NormSummary", "neighbour_similarity", "patch_norms", "summarise_norms"]
