"""A detector's file: safetensors with the weights, and the config in the header; never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...errors import AdapterFileError, install_command
from ...utils.adapter_file import read_tensors
from ...utils.staging import staged
from .config import DetectorConfig

__all__ = ["check_weights", "read_detector", "write_detector"]

_KEY, _VERSION = "register_adapter_detector", 1


def write_detector(path: str | Path, tensors: Mapping[str, torch.Tensor], config: DetectorConfig) -> Path:
    """Write beside the target, then replace it: a file is whole, or it is the one before.

    Raises:
        ValueError: The path is a folder.
        OSError: It cannot be written; what was there is untouched.
    """
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{target} is a folder; a detector is one file, for example {target / 'detector.safetensors'}")
    header = {"format": "pt", _KEY: json.dumps({"format_version": _VERSION, **config.to_dict()})}
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with staged(target.parent) as scratch:
        try:
            save_file(whole, scratch / target.name, metadata=header)
        except SafetensorError as error:
            raise OSError(f"the detector could not be saved to {target} ({error}); nothing was replaced") from error
    return target


def read_detector(path: str | Path) -> tuple[DetectorConfig, dict[str, torch.Tensor]]:
    """Config and tensors of a detector's file, on the CPU; the config is checked, the tensors are finite float32.

    Raises:
        AdapterFileError: It is damaged, not a detector, or of a newer format.
    """
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    if _KEY not in header:
        raise AdapterFileError(f"{path} is not a detector: its header has no {_KEY!r}. Nothing was loaded.")
    try:
        values = json.loads(header[_KEY])
        version = values.pop("format_version")
        if type(version) is not int or version > _VERSION:
            raise ValueError(
                f"it has format {version!r}, the newest this release knows is {_VERSION}; "
                f"upgrade with: {install_command(upgrade=True)}"
            )
        config = DetectorConfig.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterFileError(f"the detector in {path} cannot be loaded: {error}. Nothing was loaded.") from error
    return config, tensors


def check_weights(path: str | Path, tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Compare a file's tensors with those of the network that its config describes.

    Raises:
        AdapterFileError: A tensor is missing, extra, misshapen, not float32 or not finite.
    """
    faults = []
    if missing := sorted(set(wanted) - set(tensors)):
        faults.append(f"missing tensors {missing}")
    if extra := sorted(set(tensors) - set(wanted)):
        faults.append(f"unknown tensors {extra}")
    for name in sorted(set(wanted) & set(tensors)):
        tensor, expected = tensors[name], wanted[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            faults.append(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} and not {expected.dtype} {tuple(expected.shape)}"
            )
        elif not torch.isfinite(tensor).all():
            faults.append(f"{name} has values that are not finite (NaN or infinity)")
    if not faults and not (tensors["spread"] > 0).all():
        faults.append("spread has values that are not above 0")
    if faults:
        raise AdapterFileError(f"the detector in {path} cannot be loaded: {'; '.join(faults)}. Nothing was loaded.")
