"""Adapters of several PEFT methods on one model: registers next to LoRA and others, saved in one folder."""

from .composition import ComposedPeftModel, compose, load_adapters, load_onto, save_adapters
from .names import rename_adapter

__all__ = ["ComposedPeftModel", "compose", "load_adapters", "load_onto", "rename_adapter", "save_adapters"]
