"""Models of OpenCLIP by the names that OpenCLIP gives them: ``hf-hub:ORGANISATION/NAME``, ``local-dir:FOLDER``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from ...errors import MissingExtraError
from ...utils.files import check_regular

__all__ = ["is_open_clip", "load_open_clip", "open_clip_tokenizer", "open_clip_transform"]

_LOCAL, _HUB = "local-dir:", "hf-hub:"
#: What loaded models say of their images, by name: their modules do not say all of it.
_TRANSFORMS: dict[str, Any] = {}


def is_open_clip(name: str) -> bool:
    """Whether a name is one of OpenCLIP's."""
    return name.startswith((_LOCAL, _HUB))


def load_open_clip(name: str) -> nn.Module:
    """The model with its weights, image and text tower.

    Raises:
        MissingExtraError: OpenCLIP is not installed.
        ValueError, OSError: There is no such model, or it has no weights.
    """
    library = _library()
    if name.startswith(_LOCAL):
        check_regular(name.removeprefix(_LOCAL))
    try:
        model, _, _TRANSFORMS[name] = library.create_model_and_transforms(name, require_pretrained=True)
    except RuntimeError as error:  # no weights, or those of another model
        raise ValueError(f"{name} cannot be loaded by OpenCLIP: {error}") from error
    loaded: nn.Module = model.eval()
    return loaded


def open_clip_transform(name: str) -> Callable[[Any], Any]:
    """From a PIL image to what the model takes."""
    if name not in _TRANSFORMS:
        load_open_clip(name)
    transform: Callable[[Any], Any] = _TRANSFORMS[name]
    return transform


def open_clip_tokenizer(name: str) -> Callable[[Any], Any]:
    """From texts to the tokens that the model takes."""
    tokenizer: Callable[[Any], Any] = _library().get_tokenizer(name)
    return tokenizer


def _library() -> Any:
    try:
        return import_module("open_clip")
    except ImportError as error:
        raise MissingExtraError("models of OpenCLIP", "open_clip_torch", "open-clip") from error
