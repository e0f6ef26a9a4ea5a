"""What features in a store depend on, so that they are never taken for those of another model or other images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...data.processing import settings_of
from ...features.layout import tower_of
from ...features.subjects import Subject, looking_at, names_at_work
from ...towers.identity import TowerIdentity

__all__ = ["combined_digest", "source_of_features", "weights_digest"]


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
            "weights": weights_digest(tower.module),
            "adapters": combined_digest(sorted(map(str, adapters.items()))),
            "processor": settings_of(processor),
            "antialias": antialias,
        }


def _settings(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=lambda v: sorted(map(str, v)) if isinstance(v, set) else str(v))


def weights_digest(module: nn.Module, without: str | None = None) -> str:
    """A hash of every weight of a module, by name, ``without`` those of parts that are called so."""
    return combined_digest(_bytes(module, without))


def _bytes(module: nn.Module, without: str | None) -> Iterator[bytes]:
    for name, value in sorted(module.state_dict().items()):
        if without in name.split("."):
            continue
        yield name.encode()
        if isinstance(value, torch.Tensor):
            yield from map(_raw, _plain(value))


def _plain(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor, or those that one of a quantiser's own class is made of."""
    if not is_traceable_wrapper_subclass(value):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _plain(getattr(value, name))


def _raw(value: torch.Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def combined_digest(parts: Iterable[Any]) -> str:
    """A hash of several texts or bytes, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()
