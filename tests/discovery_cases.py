"""What the tests of object discovery share: the published codes' answers, and features of scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from register_adapter.testbed import make_scene

_PLACES = [parent / "shared" / "reference" for parent in Path(__file__).parents]


def reference(name: str) -> Any:
    """What a published code answers on given features; skips where the file, which the repository lacks, is not."""
    path = next((place / f"{name}_reference.npz" for place in _PLACES if place.is_dir()), None)
    if path is None:
        pytest.skip(f"shared/reference/{name}_reference.npz is not beside the repository")
    return np.load(path)


def reference_keys(data: Any, number: int, variant: str) -> npt.NDArray[Any]:
    """``(P, 384)``, float16 as they are stored but where the bias is added."""
    keys = data[f"{number}_keys_without_bias"][1:]
    return keys.astype(np.float32) + data["k_bias"] if variant == "raw" else keys


def place(data: Any, number: int) -> dict[str, Any]:
    """Keywords of both methods."""
    grid, size = (tuple(map(int, data[f"{number}_{name}"])) for name in ("dims", "image_size"))
    return {"grid": grid, "patch_size": int(data["patch"]), "image_size": size}


def scene_features(seed: int, patch: int = 8, size: int = 80) -> npt.NDArray[np.float64]:
    """``(P, D)``: the patches' own pixels, without the image's mean, so that similarities have both signs."""
    image = make_scene((5, seed), size).image / 255.0
    side = size // patch
    patches = image.reshape(side, patch, side, patch, 3).transpose(0, 2, 1, 3, 4).reshape(side**2, -1)
    return patches - patches.mean(0)
