"""The model card of an adapter."""

from __future__ import annotations

from pathlib import Path

from .config import RegisterConfig

__all__ = ["update_model_card"]


def update_model_card(path: Path, config: RegisterConfig, base_class: type) -> None:
    """Write or update the card."""
