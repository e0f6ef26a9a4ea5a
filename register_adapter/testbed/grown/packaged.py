"""Grown models in folders: a Hugging Face backbone with its image processor, the head, and its own registers if any."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ...utils.shipped import GROWN, GROWN_TILES, ship
from ..vit import folder_with, image_processor_class, load_image_processor
from .mosaics import IMAGE_MEAN, IMAGE_STD, MosaicTask
from .recipes import RECIPES, GrownModel

__all__ = ["load_grown", "read_grown", "save_grown"]

WEIGHTS = Path(__file__).parent / "weights"
_HEAD, _REGISTERS = "head.safetensors", "registers"
#: Name that leads to a packaged backbone anywhere, to its recipe.
_NAMES = {GROWN: "mosaics", GROWN_TILES: "tiles"}


def load_grown(recipe: str = "mosaics", twin: Literal["registers"] | None = None) -> GrownModel:
    """A packaged model whose artifacts grew by themselves, or its twin that had registers from the start and has none.

    Both are seed 0 of their recipe, stored in float16; ``docs/grown.md`` says how they were made.

    Args:
        recipe: ``"mosaics"`` (6 blocks of width 64, 4 heads, 80 px, 100 patches) or ``"tiles"`` (4 blocks, 1 head,
            56 px, 49 patches); neither has a CLS token.
        twin: ``"registers"`` for the twin, whose backbone has an adapter of four registers.

    Returns:
        Backbone and head, in float32 and ``eval()`` mode.

    Raises:
        ValueError: The package ships no such model.
    """
    known = sorted(path.name for path in WEIGHTS.iterdir() if path.is_dir())
    given = "-".join([str(recipe), *([str(twin)] if twin is not None else [])])
    if not isinstance(recipe, str) or recipe not in RECIPES or given not in known:
        asked = f"load_grown({recipe!r:.100}{'' if twin is None else f', twin={twin!r:.100}'})"
        raise ValueError(
            f"{asked}: no grown model {given!r:.100} is shipped; there are {', '.join(map(repr, RECIPES))}, each also "
            'with twin="registers"'
        )
    folder = WEIGHTS / given
    model = read_grown(folder)
    if twin is None:
        (name,) = (name for name, told in _NAMES.items() if told == recipe)
        backbone: Any = model.backbone
        backbone.name_or_path = backbone.config._name_or_path = name
    return model


def read_grown(folder: str | Path) -> GrownModel:
    """A model that :func:`save_grown` wrote, in float32 and ``eval()`` mode.

    Raises:
        TypeError, FileNotFoundError: ``folder`` is no folder of such a model.
    """
    folder = folder_with(folder, "config.json", _HEAD)
    backbone: Any = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    if (folder / _REGISTERS).is_dir():
        backbone = PeftModel.from_pretrained(backbone, folder / _REGISTERS)
    head = load_file(folder / _HEAD)
    targets, width = head["weight"].shape
    model = GrownModel(backbone, width, targets)
    model.head.load_state_dict({name: value.float() for name, value in head.items()})
    return model.eval().requires_grad_(False)


def save_grown(model: GrownModel, task: MosaicTask, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write backbone, image processor, head, and the registers that it had from the start.

    Args:
        model: The model; its backbone has the given precision and no registers afterwards.
        task: What it learned, for the size of the images.
        folder: Where to.
        dtype: Precision of the weights.
    """
    folder = Path(folder)
    backbone: Any = model.backbone
    if hasattr(backbone, "peft_config"):
        backbone.save_pretrained(folder / _REGISTERS)
        backbone = backbone.unload()
    backbone.to(dtype).save_pretrained(folder)
    size = {"height": task.image_size, "width": task.image_size}
    kind = image_processor_class()
    kind(size=size, image_mean=[IMAGE_MEAN] * 3, image_std=[IMAGE_STD] * 3).save_pretrained(folder)
    save_file({name: value.to(dtype).contiguous() for name, value in model.head.state_dict().items()}, folder / _HEAD)


def _backbone(recipe: str) -> Any:
    return load_grown(recipe).backbone


for _name, _recipe in _NAMES.items():
    ship(_name, partial(_backbone, _recipe), partial(load_image_processor, WEIGHTS / _recipe))
