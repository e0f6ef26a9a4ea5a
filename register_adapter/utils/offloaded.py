"""Values of adapters that accelerate keeps elsewhere, on the CPU or on disk, between two forward passes."""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

__all__ = ["state_with_values"]

#: Parts of an adapter's layers that are the base's.
_OF_THE_BASE = ("base_layer", "original_module")


def state_with_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict, in which adapters have their values, wherever those are.

    A module that accelerate offloads has empty tensors until it is called (``cpu_offload``, ``disk_offload``,
    ``dispatch_model``). The base's are left so: an adapter's file has none of them.

    Args:
        model: The model, adapters on it.
    """
    state: dict[str, torch.Tensor] = model.state_dict()
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        for name, module in layer.named_modules(prefix=path):
            inside = name.removeprefix(path).split(".")
            if not has_offloaded_params(module) or not set(inside).isdisjoint(_OF_THE_BASE):
                continue
            with align_module_device(module, torch.device("cpu")):
                for key, value in module.state_dict(prefix=f"{name}.").items():
                    if key in state and state[key].is_meta and not value.is_meta:
                        state[key] = value.detach().clone()
    return state
