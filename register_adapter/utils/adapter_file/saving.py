"""What may be written into an adapter's file: only what a loader takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .keys import GATE_KEY, NEURON_KEYS, TOKENS_KEY
from .values import first_few, value_faults

__all__ = ["check_plain", "check_savable", "check_savable_values"]


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


def check_savable_values(tensors: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """The same of tensors that are all the adapter's, whatever their keys; there are some."""
    if not tensors:
        raise ValueError(f"adapter {adapter_name!r} is not saved: its tensors are not in the state that is to be saved")
    if faults := value_faults(tensors):
        raise ValueError(
            f"adapter {adapter_name!r} is not saved, since no file with such values can be loaded: "
            f"{first_few(faults)}. What was saved before is untouched; load that, or train again with a lower "
            "learning rate."
        )
