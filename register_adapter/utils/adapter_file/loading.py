"""What a file has is compared with its config, and with what can be computed with, before a model is touched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ...errors import AdapterFileError
from .header import TensorInfo, read_header, read_tensors
from .keys import UNITS_KEY, is_foreign, is_of
from .values import DTYPES, HEAD_DTYPES, SHOWN, first_few, largest, value_faults

__all__ = ["MAX_HEADS", "check_adapter_file", "check_finite", "check_range", "check_tensors"]

#: Far beyond any adapter's ``modules_to_save``.
MAX_HEADS = 1_000
#: Tensors that other methods multiply with; some methods have indices beside theirs.
_REAL = re.compile(r"\.(lora_|ln_tuning_)")


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
    _refuse(faults + value_faults(tensors), source)


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
    _refuse(value_faults(tensors), path)
    return tensors


def check_finite(tensors: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Compare the values of an adapter of any method with what can be computed with.

    Raises:
        AdapterFileError: A value is not finite, or of a kind that loses something in the model's own.
    """
    odd = {key: x.dtype for key, x in tensors.items() if x.is_complex() or x.dtype == torch.bool}
    odd |= {key: x.dtype for key, x in tensors.items() if _REAL.search(key) and not x.is_floating_point()}
    _refuse([f"{key} has dtype {dtype}" for key, dtype in odd.items()] + value_faults(tensors), source)


def check_range(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, source: str | Path) -> None:
    """Compare the values of an adapter with what a model of another dtype can hold.

    Raises:
        AdapterFileError: A value would become infinite in it.
    """
    limit = torch.finfo(dtype).max
    real = {key: value for key, value in tensors.items() if value.is_floating_point() and not value.is_meta}
    sizes = {key: float(largest(value)) for key, value in real.items() if value.numel()}
    _refuse(
        [
            f"{key} has values up to {size:.3g}, and the model is in {dtype}, which ends at {limit:.3g}"
            for key, size in sizes.items()
            if size > limit
        ],
        source,
    )


def _refuse(faults: list[str], source: str | Path) -> None:
    if faults:
        raise AdapterFileError(f"the adapter in {source} cannot be loaded: {first_few(faults)}. Nothing was changed.")


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
        allowed = HEAD_DTYPES if key not in tokens else (torch.int64,) if key.endswith(UNITS_KEY) else DTYPES
        if info.dtype not in allowed:
            faults.append(f"{key} has dtype {info.dtype}, expected one of {', '.join(map(str, allowed))}")
    return faults


def _names(keys: Iterable[str]) -> list[str]:
    return sorted(keys)[:SHOWN]
