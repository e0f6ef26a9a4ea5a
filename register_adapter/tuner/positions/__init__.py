"""Position embeddings that move: offsets beside the frozen ones, as a PEFT method of their own."""

from .config import PositionConfig
from .layer import PositionLayer, position_layers
from .model import PositionModel

__all__ = ["PositionConfig", "PositionLayer", "PositionModel", "position_layers"]
