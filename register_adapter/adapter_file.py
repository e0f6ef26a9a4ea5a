"""Reading an adapter's safetensors file with suspicion: everything wrong with it is found before a model is touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import AdapterFileError

__all__ = ["TOKENS_KEY", "check_adapter_file", "check_tensors", "read_tensors"]

#: The end of the register tokens' key, whatever the tower's place in the model it was saved from.
TOKENS_KEY = "registers.register_adapter_tokens.weight"
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


def check_tensors(
    tensors: Mapping[str, torch.Tensor],
    num_registers: int,
    hidden_size: int | None,
    modules_to_save: list[str] | None,
    source: str | Path,
) -> None:
    """Compare an adapter's tensors with what its config says.

    Args:
        tensors: Key to tensor, as stored in the file.
        num_registers: R of the config.
        hidden_size: D of the base the adapter was made for, ``None`` if not known.
        modules_to_save: Names of whole modules that are saved beside the registers.
        source: Named in the error.

    Raises:
        AdapterFileError: A tensor is missing, extra, misshapen, of a wrong dtype, or not finite.
    """
    faults = []
    tokens = [key for key in tensors if key.endswith(TOKENS_KEY)]
    if len(tokens) != 1:
        faults.append(f"expected one tensor '...{TOKENS_KEY}', found {len(tokens)} among {sorted(tensors)}")
    for key in tokens:
        shape = tuple(tensors[key].shape)
        width = hidden_size if hidden_size is not None else (shape or (0,))[-1]
        if shape != (num_registers, width):
            faults.append(f"{key} has shape {shape}, the config says ({num_registers}, {width})")
    saved = modules_to_save or []
    extra = [key for key in tensors if key not in tokens and not any(f".{name}." in f".{key}" for name in saved)]
    if extra:
        faults.append(f"tensors that the config does not mention: {sorted(extra)}")
    missing = [name for name in saved if not any(f".{name}." in f".{key}" for key in tensors)]
    if missing:
        faults.append(f"no tensors of the modules_to_save {missing}")
    for key, tensor in tensors.items():
        if tensor.is_meta:
            continue
        if key in tokens and tensor.dtype not in _DTYPES:
            faults.append(f"{key} has dtype {tensor.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            faults.append(f"{key} has values that are not finite (NaN or infinity)")
    if faults:
        raise AdapterFileError(f"the adapter in {source} cannot be loaded: {'; '.join(faults)}. Nothing was changed.")


def check_adapter_file(
    path: str | Path, num_registers: int, hidden_size: int | None, modules_to_save: list[str] | None
) -> None:
    """Read and check a whole adapter file; see :func:`read_tensors` and :func:`check_tensors` for what is raised."""
    check_tensors(read_tensors(path), num_registers, hidden_size, modules_to_save, path)
