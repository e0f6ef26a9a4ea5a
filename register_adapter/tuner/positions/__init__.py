"""Position embeddings that move: offsets beside the frozen ones, as a PEFT method of their own."""

from .config import PositionConfig
from .following import Walked, find_again, position_layers, take_off
from .layer import PositionLayer
from .model import PositionModel

__all__ = ["PositionConfig", "PositionLayer", "PositionModel", "Walked", "find_again", "position_layers", "take_off"]
