"""A detector of artifacts that learns from attention alone: its shape, its file, its training."""

from .config import DetectorConfig
from .features import attention_features
from .model import AttentionDetector
from .training import train_detector

__all__ = ["AttentionDetector", "DetectorConfig", "attention_features", "train_detector"]
