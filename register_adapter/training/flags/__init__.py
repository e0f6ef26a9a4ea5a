"""Flags of the training command: those of model and registers, and a file with any of them."""

from .config_file import config_words, did_you_mean, render_config
from .model_arguments import ModelArguments

__all__ = ["ModelArguments", "config_words", "did_you_mean", "render_config"]
