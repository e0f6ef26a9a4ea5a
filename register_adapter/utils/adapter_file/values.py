"""What the values of an adapter's tensors may be: of these dtypes, finite, and with a finite square."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..text import shortened
from .keys import UNITS_KEY

__all__ = ["DTYPES", "HEAD_DTYPES", "SHOWN", "first_few", "largest", "value_faults"]

#: Dtypes of registers, and of what goes with them.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: A head of modules_to_save may have counters, such as those of a batch norm.
HEAD_DTYPES = (*DTYPES, torch.int64)
#: Faults, or keys, that an error lists.
SHOWN = 10
#: The largest value whose square float32 can hold: norms, layer norms and attention multiply values of one size.
_LARGEST = torch.finfo(torch.float32).max ** 0.5


def value_faults(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What is wrong with the values of tensors, which the sentences name by their keys."""
    faults = []
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_quantized:  # torch.ao's state has dtypes and scales too
            faults.append(f"{key} is of a quantised module (save the adapter before its head is quantised)")
            continue
        if tensor.is_meta:
            continue
        if key.endswith(UNITS_KEY) and not tensor.is_floating_point() and (tensor < 0).any():
            faults.append(f"{key} has negative indices")
        elif tensor.is_floating_point() and tensor.numel():
            size = float(largest(tensor).float())  # as used: a double beyond float32 becomes infinite
            if not math.isfinite(size):
                faults.append(f"{key} has values that are not finite (NaN or infinity)")
            elif size > _LARGEST:
                faults.append(f"{key} has values up to {size:.3g}, whose squares are infinite in float32")
    return faults


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, without a copy of what may be gigabytes."""
    values = tensor if tensor.element_size() > 1 else tensor.float()
    return torch.maximum(values.max(), -values.min())


def first_few(faults: list[str]) -> str:
    """The first faults in one sentence, and how many there are beside them."""
    more = f"; and {len(faults) - SHOWN} more faults" if len(faults) > SHOWN else ""
    return "; ".join(shortened(fault, 1000) for fault in faults[:SHOWN]) + more
