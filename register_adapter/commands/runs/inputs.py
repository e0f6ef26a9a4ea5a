"""What the commands take: a model, images, an image processor, each by its name, or by a word for what is packaged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ...data.batches import list_images
from ...data.processors import load_image_processor
from ...testbed import MosaicDataset, SceneDataset, load_shipped
from ...testbed.grown import RECIPES
from ...tuner.composed import load_onto
from ...utils.files import check_regular
from ...utils.models import loading, require_model
from ...utils.shipped import full_name, is_shipped, shipped_processor
from .open_clip_models import is_open_clip, load_open_clip, open_clip_transform

__all__ = ["adapter_name", "choose_device", "load_base", "load_images", "load_models", "load_processor", "with_adapter"]

_SEED, _NUM_DRAWN = 30_001, 256
#: Words that stand for images that the package draws, to what draws so many of them.
_DRAWN: dict[str, Callable[[int], Any]] = {
    "scenes": lambda count: SceneDataset(count, seed=_SEED, split="test"),
    "mosaics": lambda count: MosaicDataset(count, RECIPES["mosaics"].task, seed=_SEED),
    "tiles": lambda count: MosaicDataset(count, RECIPES["tiles"].task, seed=_SEED),
}


def load_base(name: str) -> nn.Module:
    """A model of transformers by its name or folder, of the class that was saved, or the packaged ViT by its word.

    ``hf-hub:…`` and ``local-dir:…`` are models of OpenCLIP.

    Raises:
        OSError: There is no such model, or its folder holds something that is not a regular file.
        ValueError: Its files are damaged or do not belong together.
    """
    name = full_name(name)
    if is_shipped(name):
        named: nn.Module = load_shipped(name)
        return named
    if is_open_clip(name):
        return load_open_clip(name)
    check_regular(name)
    require_model(name)
    with loading(name):
        config = transformers.AutoConfig.from_pretrained(name)
        # The class that was saved, so that no weight of a head is missing where an adapter looks for it.
        saved = getattr(transformers, str((getattr(config, "architectures", None) or [""])[0]), None)
        is_model = isinstance(saved, type) and issubclass(saved, transformers.PreTrainedModel)
        kind: Any = saved if is_model else transformers.AutoModel
        model: nn.Module = kind.from_pretrained(name).eval()
    return model


def load_processor(name: str) -> Any:
    """The image processor that goes with :func:`load_base`."""
    name = full_name(name)
    if is_open_clip(name):
        return open_clip_transform(name)
    return shipped_processor(name) if is_shipped(name) else load_image_processor(name)


def load_images(name: str, limit: int | None = None) -> Any:
    """The files of a folder, or drawn images (256 by default) for a word: scenes, mosaics or tiles."""
    if name in _DRAWN and not Path(name).exists():
        return _DRAWN[name](limit or _NUM_DRAWN)
    return list_images(name)


def with_adapter(base: nn.Module, adapter: str) -> nn.Module:
    """A copy of the base with one adapter, or with all of a folder that holds several."""
    if not adapter:
        raise ValueError("the name of an adapter is empty; give its folder, or its name on the Hub")
    return load_onto(copy.deepcopy(base), adapter)


def load_models(model: str, adapters: Sequence[str]) -> dict[str, nn.Module]:
    """The base and a copy of it with each adapter, by the names that a report gives them; the base is the first.

    Raises:
        BaseModelMismatchError: An adapter was made for another base.
        ValueError: An adapter is named twice.
    """
    if len(set(adapters)) < len(adapters):
        raise ValueError(f"an adapter is named twice: {', '.join(adapters)}")
    base = load_base(model)
    models: dict[str, nn.Module] = {model: base}
    for adapter in adapters:
        name = adapter_name(adapter)
        models[name if name not in models else adapter] = with_adapter(base, adapter)
    return models


def adapter_name(adapter: str) -> str:
    """What to call an adapter: the last part of its folder or repository."""
    return Path(adapter).name or adapter


def choose_device(device: str | None) -> str:
    """The device that was asked for; by default a GPU if there is one.

    Raises:
        ValueError: There is no such device.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"device {device!r} is not there ({said}); leave it out, or name cpu, cuda or cuda:0"
        ) from error
    return device
