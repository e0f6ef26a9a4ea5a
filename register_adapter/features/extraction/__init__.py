"""Features of images for others' tools: in memory, or in a file."""

from .reading import FeatureTable, get_features
from .writing import FeatureFile, write_features

__all__ = ["FeatureFile", "FeatureTable", "get_features", "write_features"]
