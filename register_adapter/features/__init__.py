"""What a vision tower does inside: hidden states, attention maps, patch grids, and passes over images."""

from .attention_maps import record_attention_maps
from .positions import antialiased_positions
from .trace import Trace, capture

__all__ = ["Trace", "antialiased_positions", "capture", "record_attention_maps"]
