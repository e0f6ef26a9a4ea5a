"""Reading an adapter's safetensors file with suspicion: everything wrong with it is found before a model is touched."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import AdapterFileError

__all__ = [
    "GATE_KEY",
    "NEURON_KEYS",
    "TOKENS_KEY",
    "UNITS_KEY",
    "check_adapter_file",
    "check_tensors",
    "is_foreign",
    "read_tensors",
]

#: The end of the register tokens' key, whatever the tower's place in the model it was saved from.
TOKENS_KEY = "registers.register_adapter_tokens.weight"
#: The same of the gate on their attention logits.
GATE_KEY = "registers.register_adapter_tokens.gate"
#: The same of the register neurons: which hidden units they are, and what goes with them.
UNITS_KEY = "registers.register_adapter_tokens.units"
NEURON_KEYS = (UNITS_KEY, *(f"registers.register_adapter_tokens.{name}" for name in ("usual", "limits", "strength")))
_FOREIGN = re.compile(r"(^|\.)registers\.register_adapter_tokens\.[^.]+\.(weight|gate|units|usual|limits|strength)$")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        AdapterFileError: The file is truncated, has a bad header, or is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, UnicodeDecodeError, json.JSONDecodeError, ValueError) as error:
        raise AdapterFileError(
            f"{path} is not a whole safetensors file ({error}). Nothing was loaded. Download or save the adapter "
            "again; pickled weights are never read."
        ) from error


def is_foreign(key: str) -> bool:
    """Whether a key is of another adapter of the model that was saved: PEFT 0.18 writes those along, by their names."""
    return _FOREIGN.search(key) is not None


def check_tensors(
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    modules_to_save: list[str] | None,
    source: str | Path,
) -> None:
    """Compare an adapter's tensors with what its config says.

    Args:
        tensors: Key to tensor, as stored in the file.
        shapes: End of a key to the shape of its tensor, -1 for a size that is not known.
        modules_to_save: Names of whole modules that are saved beside the registers.
        source: Named in the error.

    Raises:
        AdapterFileError: A tensor is missing, extra, misshapen, of a wrong dtype, or not finite.
    """
    faults = []
    tokens = []
    for end, expected in shapes.items():
        found = [key for key in tensors if key.endswith(end)]
        tokens += found
        if len(found) != 1:
            faults.append(f"expected one tensor '...{end}', found {len(found)} among {sorted(tensors)}")
        for key in found:
            shape = tuple(tensors[key].shape)
            if len(shape) != len(expected) or any(a not in (b, -1) for a, b in zip(expected, shape, strict=True)):
                wanted = ", ".join("any" if size == -1 else str(size) for size in expected)
                faults.append(f"{key} has shape {shape}, the config says ({wanted})")
    saved = modules_to_save or []
    known = [key for key in tensors if key in tokens or is_foreign(key)]
    extra = [key for key in tensors if key not in known and not any(f".{name}." in f".{key}" for name in saved)]
    if extra:
        faults.append(f"tensors that the config does not mention: {sorted(extra)}")
    missing = [name for name in saved if not any(f".{name}." in f".{key}" for key in tensors)]
    if missing:
        faults.append(f"no tensors of the modules_to_save {missing}")
    for key, tensor in tensors.items():
        if tensor.is_meta:
            continue
        wanted_dtypes = (torch.int64,) if key.endswith(UNITS_KEY) else _DTYPES
        if key in tokens and tensor.dtype not in wanted_dtypes:
            faults.append(f"{key} has dtype {tensor.dtype}, expected one of {', '.join(map(str, wanted_dtypes))}")
        elif key.endswith(UNITS_KEY) and (tensor < 0).any():
            faults.append(f"{key} has negative indices")
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            faults.append(f"{key} has values that are not finite (NaN or infinity)")
    if faults:
        raise AdapterFileError(f"the adapter in {source} cannot be loaded: {'; '.join(faults)}. Nothing was changed.")


def check_adapter_file(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]], modules_to_save: list[str] | None
) -> None:
    """Read and check a whole adapter file; see :func:`read_tensors` and :func:`check_tensors` for what is raised."""
    check_tensors(read_tensors(path), shapes, modules_to_save, path)
