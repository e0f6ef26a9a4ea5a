"""The names of adapters on a model, whatever their PEFT methods: which there are, and how one is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...utils.parameters import check_module
from ..fields import check_known
from ..heads import HeadLabels, check_adapter_name, renew_shown
from .class_names import rename_classes
from .folder import check_name
from .methods import check_composable

__all__ = ["check_adapters", "configs_of", "innermost", "rename_adapter"]


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name, in place; values, order and state stay. PEFT has no call for it.

    Args:
        model: Any model that carries adapters of PEFT.
        old: The name it has.
        new: The name it gets.

    Raises:
        ValueError: There is no adapter ``old``, or ``new`` is in use, not a plain name, or a head's.
    """
    base = innermost(model)
    configs = configs_of(base)
    check_known([old], configs)
    if check_name(new) in configs:
        raise ValueError(f"the name {new!r} is in use; the model has {list(configs)}")
    check_adapter_name(base, new, getattr(configs[old], "modules_to_save", None) or ())
    renew_shown(base)  # it goes by the old name
    rename_classes(base, old, new)
    for module in [*model.modules(), *base.modules()]:
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper | BaseTuner | PeftModel):
            _rename(module, old, new)
    _rename_key(configs, old, new)


def _rename(holder: nn.Module, old: str, new: str) -> None:
    """Rename in all that a tuner, its layers and wrappers keep by an adapter's name, declared to PEFT or not."""
    tables = [value for name, value in vars(holder).items() if isinstance(value, dict) and name not in _TORCH_TABLES]
    for table in [*tables, *holder.children()]:
        if isinstance(table, dict | nn.ModuleDict | nn.ParameterDict) or type(table).__name__ == "BufferDict":
            _rename_key(table, old, new)
    for name in ("_active_adapter", "active_adapter", "merged_adapters", "_adapters"):
        value = vars(holder).get(name)
        if isinstance(value, str) and value == old:
            setattr(holder, name, new)
        elif isinstance(value, list | set):
            setattr(holder, name, type(value)(new if adapter == old else adapter for adapter in value))


_TORCH_TABLES = frozenset(vars(nn.Module()))


def _rename_key(table: Any, old: str, new: str) -> None:
    if isinstance(table, HeadLabels):
        table.rename(old, new)
    if old not in table:
        return
    items = [(new if key == old else key, value) for key, value in table.items()]
    for key in list(table.keys()):
        del table[key]
    for key, value in items:
        table[key] = value


def innermost(model: nn.Module) -> nn.Module:
    """The base model inside all of PEFT's wrappers."""
    while isinstance(model, PeftModel | PeftMixedModel):
        model = model.base_model.model
    return model


def configs_of(base: nn.Module) -> dict[str, PeftConfig]:
    """Config by name of the adapters on a base model."""
    return cast("dict[str, PeftConfig]", getattr(base, "peft_config", {}))


def check_adapters(base: nn.Module, new: Mapping[str, PeftConfig]) -> None:
    """Check that the adapters on a base, and those to come, can be told apart by their names.

    Args:
        base: The base model.
        new: Config by name of adapters to come.

    Raises:
        ValueError: A name is in use, is not a plain name, or stands for two adapters; a method puts no layers on a
            model, repeats blocks, or has token indices.
        TypeError: What is to come is not a config.
    """
    check_module(base)
    known = configs_of(base)
    for name, config in new.items():
        if check_name(name) in known:
            raise ValueError(f"the model has an adapter {name!r} already; choose another name than {list(known)}")
        if not isinstance(config, PeftConfig):
            raise TypeError(f"expected a config of PEFT for the adapter {name!r}, got {type(config).__name__}")
    for name, config in {**known, **new}.items():
        check_composable(name, config)
    for layer in base.modules():
        if isinstance(layer, BaseTunerLayer):
            for name in layer._all_available_adapter_names():
                method = known[name].peft_type if name in known else None
                if method is None or not isinstance(layer, PEFT_TYPE_TO_TUNER_MAPPING[method].tuner_layer_cls):
                    raise ValueError(
                        f"{type(layer).__name__} holds the adapter {name!r}, but the model's peft_config has "
                        f"{ {key: config.peft_type.value for key, config in known.items()} }: an adapter of another "
                        "method was given the same name, or the config was deleted. Build the model again with "
                        "compose(base, {name: config, ...})."
                    )
