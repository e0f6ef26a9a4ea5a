"""What a result was measured with: versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from accelerate import Accelerator

__all__ = ["git_commit", "hardware", "machine", "versions"]

_PACKAGES = ("register-adapter", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "pillow")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result depends on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    # The package's metadata leave out which build it is (+cpu, +cu132).
    found["torch"] = str(torch.__version__)
    return found


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
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
