"""Features of images for others' tools: in memory, or in a file."""

from .reading import FeatureTable, get_features

__all__ = ["FeatureTable", "get_features"]
