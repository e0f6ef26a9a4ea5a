"""Adapters of other methods inside of a module that one adapter trains and saves as a whole (``modules_to_save``)."""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..heads import modules_called

__all__ = ["check_free", "check_own_layers", "wrappers"]


def wrappers(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """What PEFT has put around modules that are saved as a whole, by its name."""
    return {path: part for path, part in model.named_modules() if isinstance(part, ModulesToSaveWrapper)}


def check_free(model: nn.Module, names: Iterable[str], adapter_name: str) -> None:
    """The modules that an adapter is to train as a whole have no other adapter's layers in them.

    Raises:
        ValueError: One has.
    """
    for name in names:
        for path, module in modules_called(model, name).items():
            _check(path, module, adapter_name)


def check_own_layers(model: nn.Module, owners: Iterable[str] | None = None) -> None:
    """The modules that adapters train as a whole have no other adapter's layers in them.

    Args:
        model: The model with the adapters.
        owners: Those whose modules are looked at, default all.

    Raises:
        ValueError: One has.
    """
    for path, wrapper in wrappers(model).items():
        for owner, copied in wrapper.modules_to_save.items():
            if owners is None or owner in owners:
                _check(path, copied, owner)


def _check(path: str, module: nn.Module, owner: str) -> None:
    for place, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer) and (strangers := _adapters_of(layer) - {owner}):
            raise ValueError(
                f"the adapter {min(strangers)!r} has a layer on {f'{path}.{place}'.rstrip('.')!r}, and the adapter "
                f"{owner!r} trains and saves {path!r} as a whole (modules_to_save): what is saved could not be told "
                "apart. Leave that module to one of them, by target_modules, exclude_modules or modules_to_save."
            )


def _adapters_of(layer: BaseTunerLayer) -> set[str]:
    tables = [getattr(layer, attribute, None) for attribute in layer.adapter_layer_names]
    return {name for table in tables if isinstance(table, nn.ModuleDict | nn.ParameterDict) for name in table}
