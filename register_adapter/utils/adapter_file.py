"""Reading an adapter's safetensors file with suspicion: everything wrong with it is found before a model is touched."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..errors import AdapterFileError
from .files import open_regular
from .text import shortened

__all__ = [
    "GATE_KEY",
    "MAX_HEADS",
    "NEURON_KEYS",
    "STRENGTH_KEY",
    "TOKENS_KEY",
    "UNITS_KEY",
    "TensorInfo",
    "check_adapter_file",
    "check_finite",
    "check_plain",
    "check_range",
    "check_savable",
    "check_savable_values",
    "check_tensors",
    "is_foreign",
    "is_of",
    "read_header",
    "read_metadata",
    "read_tensors",
]

#: The end of the register tokens' key, whatever the tower's place in the model it was saved from.
TOKENS_KEY = "registers.register_adapter_tokens.weight"
#: The same of the gate on their attention logits.
GATE_KEY = "registers.register_adapter_tokens.gate"
#: The same of the register neurons: which hidden units they are, and what goes with them.
UNITS_KEY = "registers.register_adapter_tokens.units"
STRENGTH_KEY = "registers.register_adapter_tokens.strength"
NEURON_KEYS = (UNITS_KEY, *(f"registers.register_adapter_tokens.{name}" for name in ("usual", "limits")), STRENGTH_KEY)
#: What PEFT puts before every key of a model.
_PREFIX = "base_model.model."
_FOREIGN = re.compile(r"(^|\.)registers\.register_adapter_tokens\.[^.]+\.(weight|gate|units|usual|limits|strength)$")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# A head of modules_to_save may have counters, such as those of a batch norm.
_HEAD_DTYPES = (*_DTYPES, torch.int64)
# safetensors' names of the dtypes that torch has; those that no adapter has are refused by name later.
_BY_NAME = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Far beyond any adapter: bytes of a header, tensors in it, dimensions of one.
_MAX_HEADER, _MAX_TENSORS, _MAX_DIMENSIONS = 2**24, 20_000, 8
MAX_HEADS = 1_000
_METADATA = "__metadata__"
#: The largest value whose square float32 can hold: norms, layer norms and attention multiply values of one size.
_LARGEST = torch.finfo(torch.float32).max ** 0.5
_SHOWN = 10
#: Tensors that other methods multiply with; some methods have indices beside theirs.
_REAL = re.compile(r"\.(lora_|ln_tuning_)")


class TensorInfo(NamedTuple):
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Dtypes and shapes of a safetensors file, of which only the header is read: a value may be gigabytes of zeros.

    Raises:
        AdapterFileError: There is no regular file there, or its header is damaged, or not of a size that adapters have.
    """
    try:
        return {key: _info(key, entry) for key, entry in _entries(path).items() if key != _METADATA}
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(_not_whole(path, error)) from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in the header of a safetensors file, of which only the header is read.

    Raises:
        AdapterFileError: As for :func:`read_header`.
    """
    try:
        texts = _entries(path).get(_METADATA) or {}
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"{_METADATA} is not a table of texts")
        return texts
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(_not_whole(path, error)) from error


def _entries(path: str | Path) -> dict[str, Any]:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        entries = json.loads(file.read(length))
    if not isinstance(entries, dict) or len(entries) > _MAX_TENSORS:
        raise ValueError(f"the header is not a table of at most {_MAX_TENSORS} tensors")
    return entries


def _info(key: str, entry: Any) -> TensorInfo:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape of {key!r:.100} is not a list of at most {_MAX_DIMENSIONS} sizes")
    dtype = _BY_NAME.get(str(entry.get("dtype")))
    if dtype is None:
        raise ValueError(f"{key!r:.100} has the unknown dtype {str(entry.get('dtype'))!r:.20}")
    return TensorInfo(dtype, tuple(shape))


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        AdapterFileError: The file is truncated, has a bad header, or is not a safetensors file.
    """
    read_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # the last where it cannot be mapped
        raise AdapterFileError(_not_whole(path, error)) from error


def _not_whole(path: str | Path, error: Exception) -> str:
    return (
        f"{path} is not a whole safetensors file ({error or type(error).__name__}). Nothing was loaded. Download or "
        "save the adapter again; pickled weights are never read."
    )


def is_foreign(key: str) -> bool:
    """Whether a key is of another adapter of the model that was saved: PEFT 0.18 writes those along, by their names."""
    return _FOREIGN.search(key) is not None


def is_of(key: str, name: str) -> bool:
    """Whether a file's key is of a module that is called ``name``, which PEFT's own ``base_model.model`` may be too."""
    return "register_adapter_tokens." not in key and f".{name}." in f".{key.removeprefix(_PREFIX)}"


def check_tensors(
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    modules_to_save: list[str] | None,
    source: str | Path,
    needed: list[str] | None = None,
) -> None:
    """Compare an adapter's tensors with what its config says.

    Args:
        tensors: Key to tensor, as stored in the file.
        shapes: End of a key to the shape of its tensor, -1 for a size that is not known.
        modules_to_save: Names of whole modules that are saved beside the registers.
        source: Named in the error.
        needed: Those of ``modules_to_save`` that must be there, default all.

    Raises:
        AdapterFileError: A tensor is missing, extra, misshapen, of a wrong dtype, or not finite.
    """
    layout = {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    saved = modules_to_save or []
    faults = _layout_faults(layout, shapes, saved, saved if needed is None else needed)
    _refuse(faults + _value_faults(tensors), source)


def check_adapter_file(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    modules_to_save: list[str] | None,
    needed: list[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Read a whole adapter file, its header before any value; see :func:`check_tensors` for what is raised."""
    saved = modules_to_save or []
    _refuse(_layout_faults(read_header(path), shapes, saved, saved if needed is None else needed), path)
    tensors = read_tensors(path)
    _refuse(_value_faults(tensors), path)
    return tensors


def check_finite(tensors: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Compare the values of an adapter of any method with what can be computed with.

    Raises:
        AdapterFileError: A value is not finite, or of a kind that loses something in the model's own.
    """
    odd = {key: x.dtype for key, x in tensors.items() if x.is_complex() or x.dtype == torch.bool}
    odd |= {key: x.dtype for key, x in tensors.items() if _REAL.search(key) and not x.is_floating_point()}
    _refuse([f"{key} has dtype {dtype}" for key, dtype in odd.items()] + _value_faults(tensors), source)


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
    if faults := _value_faults(tensors):
        raise ValueError(
            f"adapter {adapter_name!r} is not saved, since no file with such values can be loaded: "
            f"{_first_few(faults)}. What was saved before is untouched; load that, or train again with a lower "
            "learning rate."
        )


def _refuse(faults: list[str], source: str | Path) -> None:
    if faults:
        raise AdapterFileError(f"the adapter in {source} cannot be loaded: {_first_few(faults)}. Nothing was changed.")


def _layout_faults(
    layout: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]], saved: list[str], needed: list[str]
) -> list[str]:
    if len(saved) > MAX_HEADS:  # each is looked for in each key
        return [f"{len(saved)} modules_to_save, where an adapter has a few"]
    faults = []
    tokens: set[str] = set()
    for end, expected in shapes.items():
        matching = [key for key in layout if key.endswith(end)]
        tokens.update(matching)
        if len(matching) != 1:
            faults.append(f"expected one tensor '...{end}', found {len(matching)} among {_names(layout)}")
        for key in matching:
            shape = layout[key].shape
            if len(shape) != len(expected) or any(a not in (b, -1) for a, b in zip(expected, shape, strict=True)):
                wanted = ", ".join("any" if size == -1 else str(size) for size in expected)
                faults.append(f"{key} has shape {shape}, the config says ({wanted})")
    extra = [
        key
        for key in layout
        if key not in tokens and not is_foreign(key) and not any(is_of(key, name) for name in saved)
    ]
    if extra:
        faults.append(f"tensors that the config does not mention: {_names(extra)}")
    missing = [name for name in needed if not any(is_of(key, name) for key in layout)]
    if missing:
        faults.append(f"no tensors of the modules_to_save {missing}")
    for key, info in layout.items():
        allowed = _HEAD_DTYPES if key not in tokens else (torch.int64,) if key.endswith(UNITS_KEY) else _DTYPES
        if info.dtype not in allowed:
            faults.append(f"{key} has dtype {info.dtype}, expected one of {', '.join(map(str, allowed))}")
    return faults


def _value_faults(tensors: Mapping[str, torch.Tensor]) -> list[str]:
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
            largest = float(_largest(tensor).float())  # as used: a double beyond float32 becomes infinite
            if not math.isfinite(largest):
                faults.append(f"{key} has values that are not finite (NaN or infinity)")
            elif largest > _LARGEST:
                faults.append(f"{key} has values up to {largest:.3g}, whose squares are infinite in float32")
    return faults


def check_range(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, source: str | Path) -> None:
    """Compare the values of an adapter with what a model of another dtype can hold.

    Raises:
        AdapterFileError: A value would become infinite in it.
    """
    limit = torch.finfo(dtype).max
    real = {key: value for key, value in tensors.items() if value.is_floating_point() and not value.is_meta}
    sizes = {key: float(_largest(value)) for key, value in real.items() if value.numel()}
    _refuse(
        [
            f"{key} has values up to {size:.3g}, and the model is in {dtype}, which ends at {limit:.3g}"
            for key, size in sizes.items()
            if size > limit
        ],
        source,
    )


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    # Without a copy of what may be gigabytes.
    values = tensor if tensor.element_size() > 1 else tensor.float()
    return torch.maximum(values.max(), -values.min())


def _names(keys: Iterable[str]) -> list[str]:
    return sorted(keys)[:_SHOWN]


def _first_few(faults: list[str]) -> str:
    more = f"; and {len(faults) - _SHOWN} more faults" if len(faults) > _SHOWN else ""
    return "; ".join(shortened(fault, 1000) for fault in faults[:_SHOWN]) + more
