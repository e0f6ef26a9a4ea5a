"""Where in a model the tensors of a file go, also those of modules saved as a whole, and for how many classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..utils.adapter_file import GATE_KEY, NEURON_KEYS, TOKENS_KEY, check_savable, is_foreign
from ..utils.offloaded import state_with_values
from ._peft_compat import renamed_by_transformers
from .config import RegisterConfig
from .layer import renew_bases

__all__ = [
    "check_copies",
    "class_rows",
    "copied_modules",
    "keys_of_copies",
    "place_of_key",
    "places",
    "saved_by_key",
    "state_to_save",
]

_PREFIX = "base_model.model."


def copied_modules(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """Path and original of every module that PEFT will make a copy of."""
    wrapped: list[str] = []
    wanted = tuple(names)
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in wrapped):
            continue
        if path.endswith(wanted):
            wrapped.append(path)
            yield path, module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def check_copies(model: nn.Module, adapter_name: str) -> None:
    """An adapter that is saved still has its copies of the modules that it trains as a whole.

    Raises:
        ValueError: Somebody has put another module in the place of one and of its copies: no loader takes what is left.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    everywhere = [part for part in model.modules() if isinstance(part, ModulesToSaveWrapper)]
    none_left = not any(adapter_name in part.modules_to_save for part in everywhere)
    for wanted in getattr(config, "modules_to_save", None) or ():
        named = {path: part for path, part in model.named_modules() if f".{path}".endswith(f".{wanted}")}
        inside = (part for outer in named.values() for part in outer.modules())  # compiled, or sharded, as a whole
        copies = (part.modules_to_save for part in inside if isinstance(part, ModulesToSaveWrapper))
        # What is not in the model at all was taken out of it, if it is not one that only some models have.
        gone = none_left and isinstance(config, RegisterConfig) and config.needs(wanted)
        if not any(adapter_name in table for table in copies) and (named or gone):
            path = min(named, default=wanted).removeprefix(_PREFIX)
            raise ValueError(
                f"{path!r} was {'replaced' if named else 'taken out'} after the adapter {adapter_name!r} was put on "
                "the model, and with it the copy that the adapter trains (modules_to_save): what would be saved could "
                "not be loaded. Replace a module before the adapter is added; now, put the one that was there back, "
                f"and a new one in its modules_to_save[{adapter_name!r}]. Nothing was saved."
            )


def places(model: nn.Module, tower_path: str, keys: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """The model's key of each tensor in a file: its tower may have another place, its modules other names by now.

    Args:
        model: The base model.
        tower_path: Where its vision tower is.
        keys: The file's keys.
        expected: The model's keys, without PEFT's prefix.

    Returns:
        The file's key to one of ``expected``; what has no place there is left out.
    """
    keys = [key for key in keys if not is_foreign(key)]
    tokens = next((key.removeprefix(_PREFIX) for key in keys if key.endswith(TOKENS_KEY)), None)
    saved_inside = None if tokens is None else tokens.removesuffix(TOKENS_KEY)
    inside = f"{tower_path}." if tower_path else ""
    free = dict.fromkeys(expected)
    placed = {}
    rename: Callable[[str], str] | None = None
    for key in keys:
        bare = key.removeprefix(_PREFIX)
        options = [bare]
        if saved_inside is not None and bare.startswith(saved_inside):
            options.insert(0, inside + bare.removeprefix(saved_inside))
        if not any(option in free for option in options):
            rename = rename or renamed_by_transformers(model)
            options = [rename(option) for option in options]
        place = next((option for option in options if option in free), None)
        if place is not None:
            placed[key] = place
            del free[place]
    return placed


def saved_by_key(model: nn.Module, adapter_name: str, keys: Iterable[str]) -> dict[str, str]:
    """The file's keys of an adapter's modules, to those by which PEFT looks for them in this model.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter.
        keys: The file's keys.
    """
    paths = dict(model.named_modules())
    prefix = _PREFIX if any(path.startswith(_PREFIX) for path in paths) else ""
    tower = next((path for path in paths if f".{path}".endswith(".registers.register_adapter_tokens")), "")
    expected = [
        f"{path.removeprefix(prefix)}.{key}"
        for path, module in paths.items()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for key in module.modules_to_save[adapter_name].state_dict()
    ]
    base = paths[prefix.rstrip(".")] if prefix else model
    path = tower.removeprefix(prefix).removesuffix("registers.register_adapter_tokens").rstrip(".")
    return {key: prefix + place for key, place in places(base, path, keys, expected).items()}


def class_rows(model: nn.Module, layout: Mapping[str, Any], own: int) -> int | None:
    """For how many classes a saved head is, ``None`` if none of the model's linear heads has an output per class.

    Args:
        model: The base model.
        layout: What the file says of the heads' tensors, by the model's keys.
        own: How many classes the model's config names.
    """
    rows = None
    for path, module in model.named_modules():
        head = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        if f"{path}.weight" in layout and isinstance(head, nn.Linear) and head.out_features == own:
            rows = int(layout[f"{path}.weight"].shape[0])
    return rows


def keys_of_copies(layout: Mapping[str, Any], adapter_name: str) -> dict[str, Any]:
    """A layout by the keys of an adapter's copies of linear heads."""
    ends = ((key.rpartition("."), info) for key, info in layout.items())
    return {f"{path}.modules_to_save.{adapter_name}.{end}": info for (path, _, end), info in ends}


def place_of_key(model: nn.Module, adapter_name: str, key: str) -> str:
    """The key in this model of what the file calls ``key``: the tower may have another place."""
    path = TOKENS_KEY.rpartition(".")[0]
    for end in (TOKENS_KEY, GATE_KEY, *NEURON_KEYS):
        if key.endswith(end):
            name = end.removeprefix(f"{path}.")
            return next(k for k in model.state_dict() if k.endswith(f"{path}.{adapter_name}.{name}"))
    return key


def state_to_save(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state that an adapter is saved from: its values are there, and loaders take them.

    Args:
        model: The model that is saved.
        adapter_name: The adapter.
        state_dict: What the caller gave; it may lack the adapter, or have empty tensors of it.

    Raises:
        ValueError: A loader would refuse the values, or the registers are no longer in the model.
    """
    own = f".register_adapter_tokens.{adapter_name}."
    if not any(own in key for key in state_dict):
        state_dict = model.state_dict()
    if any(own in key and value.is_meta for key, value in state_dict.items()):
        state_dict = state_with_values(model)
    if not getattr(model, "renews_bases", False):
        renew_bases(vars(model).get("viewed", model))
        check_copies(vars(model).get("viewed", model), adapter_name)
        check_savable(state_dict, adapter_name)  # the others do so themselves, and look at what is still to come
    return state_dict
