"""The states of every random generator of a process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "same_random_state", "set_random_state"]


def random_state() -> dict[str, Any]:
    """Every generator's state, in types that ``torch.load(weights_only=True)`` reads."""
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set every generator to a state from :func:`random_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def same_random_state() -> Iterator[None]:
    """Leave every generator as it is: whether a run is evaluated on the way must not change what it learns."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
