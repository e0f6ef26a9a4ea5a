"""What a vision tower does inside: hidden states, attention maps, patch grids, and passes over images."""

from .attention_maps import record_attention_maps
from .extraction import FeatureFile, FeatureTable, get_features, write_features
from .passes import Batch, Consumer, ImagePass, PassOptions, open_pass
from .positions import antialiased_positions
from .trace import Trace, capture

__all__ = [
    "Batch",
    "Consumer",
    "FeatureFile",
    "FeatureTable",
    "ImagePass",
    "PassOptions",
    "Trace",
    "antialiased_positions",
    "capture",
    "get_features",
    "open_pass",
    "record_attention_maps",
    "write_features",
]
