"""Reading a safetensors file with suspicion: its header alone, or all tensors once the header is in order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ...errors import AdapterFileError
from ..files import open_regular

__all__ = ["TensorInfo", "read_header", "read_metadata", "read_tensors"]

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
_METADATA = "__metadata__"


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


def _not_whole(path: str | Path, error: Exception) -> str:
    if any("\udc80" <= character <= "\udcff" for character in str(path)):  # what Python makes of other bytes
        return f"{path} has a name that is not UTF-8, which safetensors cannot open; rename it. Nothing was loaded."
    return (
        f"{path} is not a whole safetensors file ({error or type(error).__name__}). Nothing was loaded. Download or "
        "save the adapter again; pickled weights are never read."
    )
