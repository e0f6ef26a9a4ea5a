"""The tensors that a file has for modules saved as a whole: they must fit the modules of this model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from ...errors import AdapterFileError
from ...towers.tower import Tower
from ...utils.adapter_file import TensorInfo, is_foreign
from ..reading import SavedWeights

__all__ = ["check_saved_heads"]

_PREFIX = "base_model.model."


def check_saved_heads(model: nn.Module, tower: Tower, names: list[str], saved: SavedWeights) -> None:
    """The tensors of a file are those of the model's heads; a linear one may have another number of classes.

    Inside the tower keys are left to PEFT, which knows what modules were called in other releases of transformers.

    Raises:
        AdapterFileError: A tensor is missing, has no place, or has a shape that its place cannot have.
    """
    inside = f"{tower.path}." if tower.path else ""
    expected: dict[str, tuple[int, ...]] = {}
    faults = []
    for path, module in _heads(model, names):
        if f"{path}.".startswith(inside):
            continue
        shapes = {f"{path}.{key}": tuple(value.shape) for key, value in module.state_dict().items()}
        faults += _misshapen(path, module, shapes, saved.layout)
        expected |= shapes
    given = {key.removeprefix(_PREFIX): info for key, info in saved.layout.items() if not is_foreign(key)}
    own = {key for key in given if any(f".{name}." in f".{key}" for name in names)}
    own = {key for key in own if not key.startswith(inside)} if inside else set(expected)
    if missing := sorted(set(expected) - set(given)):
        faults.append(f"no tensors {missing[:10]}")
    if strange := sorted(own - set(expected)):
        faults.append(f"tensors {strange[:10]} that the heads do not have")
    if faults:
        raise AdapterFileError(
            f"the modules_to_save in {saved.path} do not fit {type(model).__name__}: {'; '.join(faults[:10])}. "
            "Nothing was changed."
        )


def _heads(model: nn.Module, names: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Path and original of every module that PEFT will make a copy of."""
    wrapped: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in wrapped):
            continue
        if any(path.endswith(name) for name in names):
            wrapped.append(path)
            yield path, module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _misshapen(
    path: str, module: nn.Module, shapes: dict[str, tuple[int, ...]], layout: dict[str, TensorInfo]
) -> list[str]:
    infos: dict[str, Any] = {key: layout.get(_PREFIX + key, layout.get(key)) for key in shapes}
    bad = {key: info.shape for key, info in infos.items() if info is not None and info.shape != shapes[key]}
    weight = bad.get(f"{path}.weight")
    if isinstance(module, nn.Linear) and weight is not None and len(weight) == 2 and weight[0]:
        # As fit_heads makes it.
        resized = {f"{path}.weight": (weight[0], module.in_features), f"{path}.bias": (weight[0],)}
        bad = {
            key: info.shape for key, info in infos.items() if info is not None and info.shape != resized.get(key, ())
        }
    return [f"{key} has shape {shape}, the model's has {shapes[key]}" for key, shape in bad.items()]
