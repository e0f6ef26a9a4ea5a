"""Image processors, looked up by the name or folder that a model was loaded from."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn
from transformers import AutoImageProcessor

from ..towers.tower import Tower
from ..utils.files import check_regular
from ..utils.models import loading, require_model
from ..utils.shipped import local_folder

__all__ = ["check_processor", "find_image_processor", "load_image_processor", "normalisation_of", "source_of"]


def source_of(model: nn.Module, tower: Tower | None = None) -> str | None:
    """Name or folder that a model was loaded from, ``None`` if it does not say.

    Args:
        model: Whose config is asked first.
        tower: Whose config is asked next.
    """
    for config in (getattr(model, "config", None), tower.config if tower is not None else None):
        name = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
        if name:
            return str(name)
    return None


def check_processor(processor: Any) -> None:
    """Refuse what cannot process an image, before any image is read: it is no image's fault.

    Args:
        processor: What a user gave as ``image_processor``; ``None`` is none.

    Raises:
        ValueError: It cannot be called, or is a class and not one of its objects.
    """
    if processor is None or (callable(processor) and not isinstance(processor, type)):
        return
    found, advice = f"{processor!r:.100} ({type(processor).__name__})", "leave it out for the model's own"
    if isinstance(processor, str):
        advice = f"load it: AutoImageProcessor.from_pretrained({processor!r:.100})"
    elif isinstance(processor, type):
        found, advice = f"the class {processor.__name__}", "make one of it, with from_pretrained or its arguments"
    raise ValueError(
        "image_processor must be an image processor of transformers or a function from a PIL image to a tensor "
        f"(3, H, W), found {found}: {advice}"
    )


def find_image_processor(source: str | None) -> Any:
    """The image processor of a model whose user gave none.

    Args:
        source: Where the model was loaded from, see :func:`source_of`.

    Raises:
        ValueError: That is not known, or there is no image processor.
    """
    if not source:
        raise ValueError(
            "the model does not say where it was loaded from, so its image processor cannot be looked up: give "
            "image_processor=, one of transformers or a function from a PIL image to a tensor (3, H, W)"
        )
    return load_image_processor(source)


def load_image_processor(name_or_path: str, **kwargs: Any) -> Any:
    """The image processor of a model; ``kwargs`` go to ``AutoImageProcessor.from_pretrained``.

    Raises:
        HubAccessError: There is no model of that name at all.
        ValueError: The folder or repository holds no image processor, or a damaged one.
        OSError: A pipe, a socket or a device is in the folder, or its description may not be read.
    """
    folder = local_folder(name_or_path)
    check_regular(folder)
    try:
        with loading(name_or_path, "image processor", kwargs.get("token")):
            return AutoImageProcessor.from_pretrained(folder, **kwargs)
    except PermissionError:  # it is there
        raise
    except OSError as error:
        require_model(name_or_path, **kwargs)
        raise ValueError(
            f"no image processor was found in {name_or_path!r}: save one of a model of the same family there, or, to "
            f"train, name that model with --image-processor-name ({type(error).__name__})"
        ) from error


def normalisation_of(processor: Any) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that a processor or a transform normalises with, ``None`` if it does not say."""
    if getattr(processor, "do_normalize", False):
        return _list(processor.image_mean), _list(processor.image_std)
    steps = getattr(processor, "val_transforms", processor)  # transformers' wrapper of timm's transforms
    for step in getattr(steps, "transforms", []):
        if type(step).__name__ == "Normalize":
            return _list(step.mean), _list(step.std)
    mean, std = getattr(processor, "mean", None), getattr(processor, "std", None)  # torchvision's presets
    return (_list(mean), _list(std)) if mean is not None and std is not None else None


def _list(values: Any) -> list[float]:
    return [float(value) for value in np.atleast_1d(values)]
