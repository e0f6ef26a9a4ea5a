"""What features in a store depend on, so that they are never taken for those of another model or other images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ...data.processing import settings_of
from ...features.layout import tower_of
from ...features.subjects import Subject, looking_at, names_at_work
from ...towers.identity import TowerIdentity

__all__ = ["combined_digest", "source_of_features"]


def source_of_features(subject: Subject, processor: Any, antialias: bool) -> dict[str, Any]:
    """What features depend on: every weight of the tower, adapters included, and how images are processed.

    Args:
        subject: A model, or one adapter of a PEFT model.
        processor: The image processor.
        antialias: Whether position embeddings are interpolated with antialiasing.
    """
    with looking_at(subject) as model:
        tower = tower_of(model)[0]
        adapters: dict[str, str] = {}
        if isinstance(model, PeftModel):
            active = [] if isinstance(subject, tuple) and subject[1] is None else names_at_work(model)
            adapters = {name: _settings(model.peft_config[name].to_dict()) for name in active}
        return {
            "base": TowerIdentity.of(tower).to_dict(),
            "weights": combined_digest(_bytes(tower.module)),
            "adapters": combined_digest(sorted(map(str, adapters.items()))),
            "processor": settings_of(processor),
            "antialias": antialias,
        }


def _settings(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=lambda v: sorted(map(str, v)) if isinstance(v, set) else str(v))


def _bytes(module: nn.Module) -> Iterator[bytes]:
    for name, value in sorted(module.state_dict().items()):
        yield name.encode()
        if isinstance(value, torch.Tensor):
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def combined_digest(parts: Iterable[Any]) -> str:
    """A hash of several texts or bytes, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()
