"""Measuring time and memory of variants that take turns, and describing the machine they ran on."""

from __future__ import annotations

import math
import os
import platform
import random
import subprocess
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from register_adapter.utils import versions

__all__ = [
    "PeakBytes",
    "Turns",
    "clock",
    "describe_machine",
    "free_bytes",
    "hardware_name",
    "memory",
    "saved_bytes",
    "spread",
    "take_turns",
]


def clock(call: Callable[[], None], device: str, calls: int = 1) -> float:
    """Seconds a call takes, averaged over ``calls`` in a row."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def spread(values: Iterable[float], digits: int = 4) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, middle, high = np.percentile(list(values), [10, 50, 90])
    names = {"median": middle, "p10": low, "p90": high}
    return {name: round(float(value), digits) for name, value in names.items()}


def take_turns(
    calls: Mapping[str, Callable[[], None]],
    ratios: Iterable[tuple[str, str]],
    device: str,
    repeats: int,
    min_time: float,
    budget: float,
) -> dict[str, Any]:
    """Time variants in turns of random order, so that a slow moment of the machine meets all of them alike.

    Args:
        calls: The variants.
        ratios: Pairs of names; their ratio is taken within each turn.
        device: ``"cpu"`` or ``"cuda"``.
        repeats: Number of turns.
        min_time: Least seconds of one timing; a short call is repeated in a row to fill them.
        budget: Most seconds that all turns together may take.

    Returns:
        What :meth:`Turns.report` gives.

    Raises:
        RuntimeError: The turns would take longer than ``budget``.
    """
    turns = Turns()
    turns.take(calls, device, repeats, min_time, budget)
    return turns.report(ratios)


class Turns:
    """Times of variants that took turns, in one build of the models or in several.

    A second copy of a model takes up to 1.5 % more or less time than the first, turn after turn, for as long as the two
    live: presumably by where their weights lie in memory. Only other builds even that out.
    """

    def __init__(self) -> None:
        self.calls_per_repeat = 1
        #: Seconds by variant, a list for each build.
        self.builds: list[dict[str, list[float]]] = []

    def take(
        self, calls: Mapping[str, Callable[[], None]], device: str, repeats: int, min_time: float, budget: float
    ) -> None:
        """Time one build; see :func:`take_turns`."""
        in_a_row = _in_a_row(calls, device, repeats, min_time, budget)
        order, rng = list(calls), random.Random(len(self.builds))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            rng.shuffle(order)
            for name in order:
                times[name].append(clock(calls[name], device, in_a_row))
        self.calls_per_repeat = in_a_row
        self.builds.append(times)

    def report(self, ratios: Iterable[tuple[str, str]]) -> dict[str, Any]:
        """``repeats``, ``calls_per_repeat``, ``milliseconds`` by variant, and ``ratios`` by ``"name/name"``.

        Ratios are taken within each turn. Of several builds there are their number, ``builds``, and the median ratio of
        each, ``ratios_by_build``, too.
        """
        pairs = {
            f"{numerator}/{denominator}": [
                [a / b for a, b in zip(t[numerator], t[denominator], strict=True)] for t in self.builds
            ]
            for numerator, denominator in ratios
        }
        times = {name: [value for t in self.builds for value in t[name]] for name in self.builds[0]}
        summary: dict[str, Any] = {
            "repeats": len(next(iter(times.values()))),
            "calls_per_repeat": self.calls_per_repeat,
            "milliseconds": {name: spread(1000 * value for value in values) for name, values in times.items()},
            "ratios": {name: spread(chain.from_iterable(values)) for name, values in pairs.items()},
        }
        if len(self.builds) > 1:
            medians = {name: [spread(values)["median"] for values in builds] for name, builds in pairs.items()}
            summary |= {"builds": len(self.builds), "ratios_by_build": medians}
        return summary


def _in_a_row(
    calls: Mapping[str, Callable[[], None]], device: str, repeats: int, min_time: float, budget: float
) -> int:
    """Warm up, and count the calls that fill ``min_time``."""
    for call in calls.values():
        # Twice: the first calls may compile, allocate or choose kernels.
        clock(call, device, 2)
    once = {name: clock(call, device) for name, call in calls.items()}
    in_a_row = max(1, math.ceil(min_time / max(once.values())))
    needed = sum(once.values()) * in_a_row * repeats
    if needed > budget:
        raise RuntimeError(
            f"one call of each variant takes {sum(once.values()):.2f} s and {repeats} repeats would take "
            f"{needed:.0f} s, over --budget {budget:.0f}"
        )
    return in_a_row


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of live tensors made inside the context, and keeps the largest sum as ``peak``.

    What an operation allocates and frees within itself is not seen, nor is compiled code.

    Args:
        known: Tensors that do not count (weights, inputs), nor do their views.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what it made."""
        for tensor in tree_leaves((args, kwargs)):
            # Made before the context: in-place operations return it, and it must not count then.
            self._note(tensor, counts=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._note(tensor, counts=True)
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, tensor: Any, counts: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            size = storage.nbytes() if counts else 0
            self._seen.add(storage._cdata)
            self.live += size
            weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def saved_bytes(call: Callable[[], None], known: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for a backward pass, without those of ``known``."""
    own = {tensor.untyped_storage()._cdata for tensor in known}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # Kept, so that its address is not given to another one.
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in saved.values())


def memory(
    call: Callable[[], None], weights: list[torch.Tensor], inputs: list[torch.Tensor], device: str, compiled: bool
) -> dict[str, int | None]:
    """Bytes of ``weights``, of everything else at its peak during a call, and of what is saved for the backward pass.

    The peak is the allocator's on CUDA and that of :class:`PeakBytes` on a CPU; ``None`` stands for what cannot be seen
    in compiled code.
    """
    known = [*weights, *inputs]
    peak = saved = None
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() - before
    elif not compiled:
        with PeakBytes(known) as counter:
            call()
        peak = counter.peak
    if not compiled:
        saved = saved_bytes(call, known)
    return {
        "weights": sum(tensor.nbytes for tensor in weights),
        "activation_peak": peak,
        "saved_for_backward": saved,
    }


def free_bytes(device: str) -> int:
    """Memory that is free now."""
    return int(torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available)


def describe_machine() -> dict[str, Any]:
    """Versions, hardware, and the commit of the repository this file is in."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "versions": versions(),
        "hardware": {
            "platform": platform.platform(),
            "cpu": names[0] if names else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def hardware_name(device: str = "cpu") -> str:
    """The name of what computes on a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(describe_machine()["hardware"]["cpu"])


def _git(*words: str) -> str | None:
    """The output of a git command, ``None`` outside a repository."""
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
