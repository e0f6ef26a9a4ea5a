"""A detector's file: safetensors with the weights, and the config in the header; never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...errors import AdapterFileError, check_format
from ...utils.adapter_file import TensorInfo, read_header, read_metadata, read_tensors
from ...utils.staging import file_to_write, staged
from .config import DetectorConfig

__all__ = ["read_config", "read_weights", "write_detector"]

_KEY, _VERSION = "register_adapter_detector", 1
_SHOWN = 10


def write_detector(path: str | Path, tensors: Mapping[str, torch.Tensor], config: DetectorConfig) -> Path:
    """Write beside the target, then replace it: a file is whole, or it is the one before.

    Raises:
        ValueError: The path is a folder.
        OSError: It cannot be written; what was there is untouched.
    """
    if Path(path).is_dir():
        raise ValueError(
            f"{path} is a folder; a detector is one file, for example {Path(path) / 'detector.safetensors'}"
        )
    target = file_to_write(path)
    header = {"format": "pt", _KEY: json.dumps({"format_version": _VERSION, **config.to_dict()})}
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with staged(target.parent) as scratch:
        try:
            save_file(whole, scratch / target.name, metadata=header)
        except SafetensorError as error:
            raise OSError(f"the detector could not be saved to {target} ({error}); nothing was replaced") from error
    return target


def read_config(path: str | Path) -> DetectorConfig:
    """The config of a detector's file, of which only the header is read.

    Raises:
        AdapterFileError: It is damaged, not a detector, or of a newer format.
    """
    header = read_metadata(path)
    if _KEY not in header:
        raise AdapterFileError(f"{path} is not a detector: its header has no {_KEY!r}. Nothing was loaded.")
    try:
        values = json.loads(header[_KEY])
        version = values.pop("format_version")
        check_format(version, _VERSION)
        config = DetectorConfig.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterFileError(f"the detector in {path} cannot be loaded: {error}. Nothing was loaded.") from error
    return config


def read_weights(path: str | Path, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file's tensors, on the CPU, if they are those of the network that its config describes.

    Raises:
        AdapterFileError: A tensor is missing, extra, misshapen, not float32 or not finite.
    """
    _refuse(path, _layout_faults(read_header(path), wanted))  # before any value is read: there may be gigabytes
    tensors = read_tensors(path)
    faults = [
        f"{name} has values that are not finite (NaN or infinity)"
        for name, tensor in sorted(tensors.items())
        if not torch.isfinite(tensor).all()
    ]
    if not faults and not (tensors["spread"] > 0).all():
        faults.append("spread has values that are not above 0")
    _refuse(path, faults)
    return tensors


def _layout_faults(layout: Mapping[str, TensorInfo], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    faults = []
    if missing := sorted(set(wanted) - set(layout)):
        faults.append(f"missing tensors {missing}")
    if extra := sorted(set(layout) - set(wanted)):
        faults.append(f"unknown tensors {extra[:_SHOWN]}")
    for name in sorted(set(wanted) & set(layout)):
        info, expected = layout[name], wanted[name]
        if info.shape != tuple(expected.shape) or info.dtype != expected.dtype:
            faults.append(f"{name} is {info.dtype} {info.shape} and not {expected.dtype} {tuple(expected.shape)}")
    return faults


def _refuse(path: str | Path, faults: list[str]) -> None:
    if faults:
        raise AdapterFileError(f"the detector in {path} cannot be loaded: {'; '.join(faults)}. Nothing was loaded.")
