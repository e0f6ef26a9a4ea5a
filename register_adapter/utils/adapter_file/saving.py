"""What may be written into an adapter's file: only what a loader takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .keys import GATE_KEY, NEURON_KEYS, TOKENS_KEY
from .values import HEAD_DTYPES, KIND_ADVICE, OTHER_DTYPES, first_few, kind_fault, value_faults

__all__ = ["check_plain", "check_savable", "check_savable_modules", "check_savable_values"]


def check_savable(tensors: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """Refuse to write values that no loader would take; of a whole model's values the adapter's are looked at.

    Args:
        tensors: The adapter's tensors by the keys of the model, or the whole model's.
        adapter_name: Its name in the model.

    Raises:
        ValueError: A value is not finite, or its square is not.
    """
    parts = (f".register_adapter_tokens.{adapter_name}.", f".modules_to_save.{adapter_name}.")
    own = {key: value for key, value in tensors.items() if any(part in key for part in parts)}
    check_plain([key.rpartition(parts[0])[2] for key in own if parts[0] in key], adapter_name)
    if own:  # a tower that was replaced has its own words
        check_savable_values(own, adapter_name)


def check_plain(keys: list[str], adapter_name: str) -> None:
    """Refuse to write registers that are not parameters of their own any more: no loader would find their values.

    Args:
        keys: Keys of the adapter's registers, from its name on.
        adapter_name: Its name in the model.

    Raises:
        ValueError: They are computed from other tensors.
    """
    own = {key.rpartition(".")[2] for key in (TOKENS_KEY, GATE_KEY, *NEURON_KEYS)}
    made = [key for key in keys if key.rpartition(".")[2] not in own]
    if made:
        raise ValueError(
            f"adapter {adapter_name!r} is not saved, since its registers are computed from other tensors ({made[0]}): "
            "no file with those can be loaded. Make them plain first, with "
            "torch.nn.utils.parametrize.remove_parametrizations(...), or prune.remove(...), remove_weight_norm(...) or "
            "remove_spectral_norm(...) of torch.nn.utils."
        )


def check_savable_values(tensors: Mapping[str, torch.Tensor], adapter_name: str, own: bool = True) -> None:
    """The same of tensors that are all the adapter's, whatever their keys; there are some.

    Args:
        tensors: The adapter's tensors.
        adapter_name: Its name in the model.
        own: They are registers or offsets, and what is trained beside them: no other method's, which may have indices.
    """
    if not tensors:
        raise ValueError(f"adapter {adapter_name!r} is not saved: its tensors are not in the state that is to be saved")
    found = {key: kind_fault(value, HEAD_DTYPES if own else OTHER_DTYPES) for key, value in tensors.items()}
    if faults := [f"{key} {fault}" for key, fault in found.items() if fault]:
        raise ValueError(
            f"adapter {adapter_name!r} is not saved, since no file with such tensors can be loaded: "
            f"{first_few(faults)}. What was saved before is untouched. {KIND_ADVICE}"
        )
    if faults := value_faults(tensors):
        raise ValueError(
            f"adapter {adapter_name!r} is not saved, since no file with such values can be loaded: "
            f"{first_few(faults)}. What was saved before is untouched; load that, or train again with a lower "
            "learning rate."
        )


def check_savable_modules(modules: Mapping[str, nn.Module], own: bool = True) -> None:
    """Refuse to train modules beside an adapter whose state no file may have: it would be found when it is saved.

    Args:
        modules: Path to module.
        own: As for :func:`check_savable_values`.

    Raises:
        ValueError: One is quantised, or has a value of a dtype that no loader takes.
    """
    for path, module in modules.items():
        for key, value in module.state_dict().items():
            if fault := kind_fault(value, HEAD_DTYPES if own else OTHER_DTYPES):
                raise ValueError(
                    f"modules_to_save names {path!r}, whose {key!r} {fault}: what is trained beside an adapter could "
                    f"not be loaded from its file. {KIND_ADVICE}"
                )
