"""What the values of an adapter's tensors may be: of these dtypes, finite, and with a finite square."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from ..text import shortened
from .keys import UNITS_KEY

__all__ = [
    "DTYPES",
    "HEAD_DTYPES",
    "KIND_ADVICE",
    "OTHER_DTYPES",
    "SHOWN",
    "first_few",
    "kind_fault",
    "largest",
    "value_faults",
]

#: Dtypes of registers, and of what goes with them.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: A head of modules_to_save may have counters, such as those of a batch norm.
HEAD_DTYPES = (*DTYPES, torch.int64)
#: What other methods may have beside them.
OTHER_DTYPES = (*HEAD_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.int16, torch.int8, torch.uint8)
#: What to do about a value that :func:`kind_fault` tells of.
KIND_ADVICE = (
    "Quantise a model without what is trained beside its adapter, or once the adapter is saved; keep buffers of other "
    "dtypes out of the state, with register_buffer(..., persistent=False), or make them float or int64."
)
#: Faults, or keys, that an error lists.
SHOWN = 10
#: The largest value whose square float32 can hold: norms, layer norms and attention multiply values of one size.
_LARGEST = torch.finfo(torch.float32).max ** 0.5


def kind_fault(value: object, dtypes: Collection[torch.dtype] | None = None) -> str | None:
    """Why a value of a module's state has no place in an adapter's file, ``None`` where it may have one.

    Args:
        value: The value.
        dtypes: Those that a tensor may have, default any.
    """
    # torchao's weights wrap tensors of their own, as DTensors do; torch.ao's state has dtypes and scales in it.
    wraps = hasattr(value, "__tensor_flatten__") and not hasattr(value, "full_tensor")
    if wraps or isinstance(value, torch.dtype) or getattr(value, "is_quantized", False):
        return "is of a quantised module"
    if not isinstance(value, torch.Tensor):
        return f"is no tensor but a {type(value).__name__}"
    return f"has dtype {value.dtype}" if dtypes is not None and value.dtype not in dtypes else None


def value_faults(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What is wrong with the values of tensors, which the sentences name by their keys."""
    faults = []
    for key, tensor in tensors.items():
        if fault := kind_fault(tensor):
            faults.append(f"{key} {fault}")
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
