"""What a result was measured with: versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

import torch
from accelerate import Accelerator

__all__ = ["git_commit", "hardware", "has_accelerator", "machine", "version", "versions"]

_PACKAGE = "register-adapter"
_PACKAGES = (_PACKAGE, "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "pillow")


def version() -> str:
    """The version of this package; ``"unknown"`` for a copy of the sources that was never installed."""
    return _installed(_PACKAGE) or "unknown"


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result depends on."""
    # The metadata of torch leave out which build it is (+cpu, +cu132).
    return {
        "python": platform.python_version(),
        **{name: _installed(name) for name in _PACKAGES},
        "torch": str(torch.__version__),
    }


def _installed(package: str) -> str | None:
    """The version in a package's metadata, ``None`` if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_accelerator() -> bool:
    """Whether torch sees a GPU or the like; older releases of it know CUDA alone."""
    known = hasattr(torch, "accelerator")
    return torch.accelerator.is_available() if known else torch.cuda.is_available()


def hardware(accelerator: Accelerator) -> dict[str, Any]:
    """Device, number of processes and threads, and precision of a run."""
    return {
        **machine(accelerator.device),
        "num_processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Device, processor, cores and threads."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str | None:
    """The commit of the current folder's git checkout, ``None`` outside of one."""
    try:
        completed = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.strip() or None
