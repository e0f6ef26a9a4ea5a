"""The tensors that a file has for modules saved as a whole: they must fit the modules of this model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import nn

from ...errors import AdapterFileError
from ...towers.tower import Tower
from ...utils.adapter_file import TensorInfo, is_foreign, is_of, kind_fault
from ..reading import SavedWeights
from ..saved_keys import copied_modules, places, saved_by_key

__all__ = ["check_saved_heads", "lost_heads"]

_SHOWN = 10


def check_saved_heads(model: nn.Module, tower: Tower, names: list[str], saved: SavedWeights) -> dict[str, TensorInfo]:
    """The tensors of a file are those of the model's modules; a linear head may have another number of classes.

    Returns:
        What the file says of each of them, by the model's keys.

    Raises:
        AdapterFileError: A tensor is missing, has no place, or has a shape or dtype that its place cannot have.
    """
    inside = f"{tower.path}." if tower.path else ""
    modules = dict(copied_modules(model, names))
    named = getattr(tower.module, "get_classifier", None)
    classifier = named() if callable(named) else None
    values = {path: {f"{path}.{k}": v for k, v in module.state_dict().items()} for path, module in modules.items()}
    odd = {key: kind_fault(value) for own in values.values() for key, value in own.items()}
    if unfit := [f"the model's {key} {fault}" for key, fault in odd.items() if fault]:
        raise AdapterFileError(
            f"the modules_to_save in {saved.path} do not fit {type(model).__name__}: {'; '.join(unfit[:_SHOWN])}. "
            "Nothing was changed. Load the adapter first, and quantise the rest of the model then."
        )
    shapes = {path: {key: tuple(value.shape) for key, value in own.items()} for path, own in values.items()}
    expected = [key for keys in shapes.values() for key in keys]
    placed = places(model, tower.path, saved.layout, expected)
    layout = {place: saved.layout[key] for key, place in placed.items()}
    faults = []
    for path, module in modules.items():
        # A layer within the tower has the size that its neighbours need; timm's towers have their classifier in them.
        within = bool(inside) and path.startswith(inside) and module is not classifier
        resizable = isinstance(module, nn.Linear) and not within
        faults += _misshapen(path, resizable, shapes[path], layout)
        faults += [
            f"{key} has dtype {layout[key].dtype}, the model's has {value.dtype}"
            for key, value in values[path].items()
            if key in layout and layout[key].dtype.is_floating_point != value.dtype.is_floating_point
        ]
    if missing := [key for key in expected if key not in layout]:
        faults.append(f"no tensors {sorted(missing)[:_SHOWN]}")
    own = {key for key in saved.layout if any(is_of(key, name) for name in names) and not is_foreign(key)}
    if strange := sorted(own - set(placed)):
        faults.append(f"tensors {strange[:_SHOWN]} that the modules do not have")
    if faults:
        raise AdapterFileError(
            f"the modules_to_save in {saved.path} do not fit {type(model).__name__}: {'; '.join(faults[:_SHOWN])}. "
            "Nothing was changed."
        )
    return layout


def lost_heads(model: nn.Module, adapter_name: str, saved: SavedWeights) -> list[str]:
    """Modules that are saved as a whole and have other values than the file, once a loader has put them in.

    A trainable adapter is not looked at: it may have been trained when somebody asks.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None or not config.inference_mode or not config.modules_to_save:
        return []
    wrappers = {path: part for path, part in model.named_modules() if isinstance(part, ModulesToSaveWrapper)}
    lost: dict[str, None] = {}
    with safe_open(saved.path, framework="pt", device="cpu") as file:
        for key, place in saved_by_key(model, adapter_name, saved.layout).items():
            path = next((path for path in wrappers if place.startswith(f"{path}.")), None)
            if path is None or adapter_name not in wrappers[path].modules_to_save:
                continue
            now = wrappers[path].modules_to_save[adapter_name].state_dict().get(place.removeprefix(f"{path}."))
            # Quantised values, and those that are elsewhere, are not compared.
            if now is None or now.is_meta or not now.is_floating_point() or now.element_size() == 1:
                continue
            value = file.get_tensor(key)
            if value.shape != now.shape or not torch.equal(value.to(now.dtype), now.detach().cpu()):
                lost.setdefault(path)
    return list(lost)


def _misshapen(
    path: str, resizable: bool, shapes: Mapping[str, tuple[int, ...]], layout: Mapping[str, TensorInfo]
) -> list[str]:
    infos = {key: layout[key] for key in shapes if key in layout}
    bad = {key: info.shape for key, info in infos.items() if info.shape != shapes[key]}
    weight = bad.get(f"{path}.weight")
    if resizable and weight is not None and len(weight) == 2 and weight[0]:
        # As fit_heads makes it.
        resized = {f"{path}.weight": (weight[0], shapes[f"{path}.weight"][1]), f"{path}.bias": (weight[0],)}
        bad = {key: info.shape for key, info in infos.items() if info.shape != resized.get(key, ())}
    return [f"{key} has shape {shape}, the model's has {shapes[key]}" for key, shape in bad.items()]
