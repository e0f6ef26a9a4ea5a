"""Adapters of a folder on a model in which the tower lies elsewhere: trained on a backbone, used under a head."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from peft import PeftConfig
from safetensors.torch import save_file
from torch import nn

from ...errors import UnsupportedModelError
from ...towers.tower import find_tower
from ...utils.adapter_file import read_tensors
from ...utils.hub import WEIGHTS_NAME
from ..config import RegisterConfig
from ..layer import register_layers
from .folder import SavedAdapter

__all__ = ["relocated", "tower_path"]

_ROOT = "base_model.model."


def tower_path(base: nn.Module) -> str | None:
    """Where the vision tower lies in a base model, ``""`` if it is the tower; ``None`` if there is none, or several."""
    layers = register_layers(base)
    if layers:
        return layers[0].tower.path
    try:
        return find_tower(base).path
    except UnsupportedModelError:
        return None


@contextmanager
def relocated(saved: list[SavedAdapter], base: nn.Module) -> Iterator[list[SavedAdapter]]:
    """The adapters as they would have been saved from a model whose tower lies where it does in ``base``.

    Register adapters find their tower themselves. Within the context, the others' files are at ``copied_to``.

    Args:
        saved: From :func:`read_folder`.
        base: The base model.
    """
    here = tower_path(base)
    with tempfile.TemporaryDirectory() as scratch:
        yield [
            adapter
            if isinstance(adapter.config, RegisterConfig) or None in (adapter.tower, here) or adapter.tower == here
            else _moved(adapter, str(here), base, Path(scratch, adapter.name))
            for adapter in saved
        ]


def _moved(adapter: SavedAdapter, here: str, base: nn.Module, place: Path) -> SavedAdapter:
    old, new = (f"{path}." if path else "" for path in (adapter.tower, here))
    start = _ROOT + old
    tensors = {
        _ROOT + new + key.removeprefix(start) if key.startswith(start) else key: value
        for key, value in read_tensors(adapter.path / WEIGHTS_NAME).items()
    }
    config = _on(adapter.config, old, new, base)
    place.mkdir()
    save_file(tensors, place / WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(place))
    return replace(adapter, copied_to=place, config=config, keys=frozenset(tensors))


def _on(config: PeftConfig, old: str, new: str, base: nn.Module) -> PeftConfig:
    """The config with the names of its targets as they are in ``base``, in the tower and nowhere else."""
    config = copy.deepcopy(config)
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, list | set | tuple):
        names = {name for name, _ in base.named_modules()}
        inside = {name: new + name.removeprefix(old) for name in targets}
        config.target_modules = [inside[name] if inside[name] in names else name for name in sorted(targets)]
    return config
