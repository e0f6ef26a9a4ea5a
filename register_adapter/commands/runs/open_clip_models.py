"""Models of OpenCLIP by the names that OpenCLIP gives them: ``hf-hub:ORGANISATION/NAME``, ``local-dir:FOLDER``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ...data.texts import load_tokenizer
from ...errors import MissingExtraError
from ...utils.files import check_regular
from ...utils.hub import access_error

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


def open_clip_tokenizer(model: str, name: str | None = None) -> Callable[[Any], Any]:
    """From texts to the tokens that a model takes.

    Args:
        model: The model, by the name that OpenCLIP gives it.
        name: Another tokenizer: its folder or name on the Hub, or a model of OpenCLIP that has it; ``None``: the
            model's own.

    Raises:
        MissingExtraError: OpenCLIP is not installed.
        ValueError: There is no tokenizer.
        OSError: A pipe, a socket or a device is in the folder.
    """
    library = _library()
    asked = name or model
    check_regular(asked.removeprefix(_LOCAL))
    tokenizer: Callable[[Any], Any]
    text: dict[str, Any] = {} if name is None else (library.get_model_config(model) or {}).get("text_cfg", {})
    length = None if name is None else text.get("context_length", 77)
    if is_open_clip(asked) or (asked in library.list_models() and not Path(asked).exists()):
        try:
            tokenizer = library.get_tokenizer(asked, context_length=length)
        except Exception as error:  # of the HTTP library and of tokenizers too
            if (refused := access_error(asked.removeprefix(_HUB), error)) is not None:
                raise refused from refused.__cause__
            said = str(error).strip().partition("\n")[0].removesuffix(" from one of:")
            raise ValueError(
                f"no tokenizer could be read in {asked!r}: save the model's own there, or name one with --tokenizer "
                f"({type(error).__name__}: {said})"
            ) from error
        return tokenizer
    # OpenCLIP would take any name that it does not know for its own CLIP's tokenizer.
    load_tokenizer(asked)
    options = {"tokenizer_mode": text["tokenizer_mode"]} if text.get("tokenizer_mode") else {}
    tokenizer = library.tokenizer.HFTokenizer(asked, length, **options, **text.get("tokenizer_kwargs", {}))
    return tokenizer


def _library() -> Any:
    try:
        return import_module("open_clip")
    except ImportError as error:
        raise MissingExtraError("models of OpenCLIP", "open_clip_torch", "open-clip") from error
