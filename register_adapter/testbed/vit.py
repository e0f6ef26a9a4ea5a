"""The small ViT that the package ships, clean and with planted artifacts.

``ViTForImageClassification`` of width 128 with 8 blocks, 80 px, patch 8 (100 patches), 1.6 M parameters, trained on
scenes by ``scripts/train_testbed.py``; ``weights/results.json`` has its accuracy on held-out scenes. The planted copy
differs in four hidden units of one block, which ``scripts/plant_testbed.py`` fitted with :func:`plant_artifacts`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from ..towers.tower import find_tower
from ..utils.shipped import CLEAN, PLANTED, SHIPPED, ship, shipped_model
from .plant import Planting

__all__ = [
    "folder_with",
    "image_processor_class",
    "load_image_processor",
    "load_planted_vit",
    "load_shipped",
    "load_vit",
    "save_planting",
]

WEIGHTS = Path(__file__).parent / "weights"
_PLANTED = "planted.safetensors"


def load_vit(folder: str | Path = WEIGHTS) -> Any:
    """The clean ``ViTForImageClassification``, in float32 and ``eval()`` mode; it is stored in float16.

    Raises:
        TypeError, FileNotFoundError: ``folder`` is no folder of such a model.
    """
    folder = folder_with(folder, "config.json")
    model = transformers.ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return _named(model, CLEAN) if folder == WEIGHTS else model


def load_shipped(name: str) -> Any:
    """A shipped model by its name: ``"register-adapter://clean"``, ``planted``, ``grown`` or ``grown-tiles``.

    Adapters of these models carry such a name in their configs, and load anywhere.

    Raises:
        ValueError: The package ships no model of that name.
    """
    return shipped_model(name)


def _named(model: Any, name: str) -> Any:
    """The model under a name that leads to it on any machine, not a folder of this one."""
    model.name_or_path = model.config._name_or_path = name
    return model


def load_image_processor(folder: str | Path = WEIGHTS) -> Any:
    """Its image processor: 80 × 80 px, values scaled to -1…1.

    Raises:
        TypeError, FileNotFoundError: ``folder`` has none.
    """
    return image_processor_class().from_pretrained(folder_with(folder, "preprocessor_config.json"))


def folder_with(folder: Any, *files: str) -> Path:
    """A folder of this package's, or one written like it, after a look at what is in it.

    Raises:
        TypeError: It is no path.
        FileNotFoundError: It lacks one of the files.
    """
    advice = (
        "Leave the folder out for the packaged model; by their names models are loaded with load_shipped(name), one "
        f"of {', '.join(map(repr, SHIPPED))}."
    )
    if not isinstance(folder, str | Path):
        raise TypeError(f"folder must be a path, got {folder!r:.100}. {advice}")
    for file in files:
        if not (Path(folder) / file).is_file():
            raise FileNotFoundError(f"there is no {file} in a folder {str(folder)!r:.100}. {advice}")
    return Path(folder)


def image_processor_class() -> Any:
    """ViT's image processor, without torchvision: the default one of transformers 5 needs it, and says so at length."""
    return getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)


def load_planted_vit(folder: str | Path = WEIGHTS) -> Planting:
    """The same model with planted artifacts, and what was planted; :func:`load_vit` is its clean twin.

    Raises:
        TypeError, FileNotFoundError: ``folder`` is no folder of such a model.
    """
    folder = folder_with(folder, "config.json", _PLANTED)
    model = load_vit(folder)
    with safe_open(Path(folder) / _PLANTED, framework="pt") as file:
        metadata = file.metadata()
        rows, biases, columns = (file.get_tensor(name) for name in ("rows", "biases", "columns"))
    block, neurons = int(metadata["layer"]), [int(number) for number in metadata["neurons"].split(",")]
    tower = find_tower(model)
    gate, out = tower.block_part(block, "mlp_in"), tower.block_part(block, "mlp_out")
    with torch.no_grad():
        gate.weight[neurons] = rows
        gate.bias[neurons] = biases
        out.weight[:, neurons] = columns
    return Planting(_named(model, PLANTED) if folder == WEIGHTS else model, block, tuple(neurons))


def save_planting(planting: Planting, folder: str | Path = WEIGHTS) -> None:
    """Write the planted units beside the clean weights, for :func:`load_planted_vit`."""
    tower = find_tower(planting.model)
    gate, out = tower.block_part(planting.block, "mlp_in"), tower.block_part(planting.block, "mlp_out")
    neurons = list(planting.neurons)
    tensors = {"rows": gate.weight[neurons], "biases": gate.bias[neurons], "columns": out.weight[:, neurons]}
    metadata = {"layer": str(planting.block), "neurons": ",".join(map(str, neurons))}
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, Path(folder) / _PLANTED, metadata)


ship(CLEAN, load_vit, load_image_processor)
ship(PLANTED, lambda: load_planted_vit().model, load_image_processor)
