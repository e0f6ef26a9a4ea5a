"""How a base model is loaded and gets what is trained: apart from what it is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
)
from transformers.utils import logging

from ..utils.files import check_regular
from ..utils.models import loading, require_model
from ..utils.shipped import local_folder
from .moving import Moving, put_on
from .objectives import Objective
from .objectives.tokens import has_both_towers

__all__ = ["BASES", "load_base", "wrap"]

#: A model, what transformers says of loading it, and how the names begin of weights that may be new ones.
Loaded = tuple[nn.Module, dict[str, Any], tuple[str, ...]]


def load_base(objective: Objective, name_or_path: str, **kwargs: Any) -> nn.Module:
    """Load the kind of model that an objective is for.

    Args:
        objective: Says which kind, and what its loader must know.
        name_or_path: Name on the Hub, a folder, or the name of a shipped model.
        **kwargs: For ``from_pretrained``.

    Raises:
        HubAccessError: There is no model of that name.
        ValueError: The checkpoint lacks weights that the objective builds on, or its files are damaged.
        OSError: It cannot be read.
    """
    folder = local_folder(name_or_path)
    check_regular(folder)
    require_model(name_or_path, **kwargs)
    with loading(name_or_path, token=kwargs.get("token")):
        base, info, may_be_new = BASES[objective.base](folder, **objective.base_options, **kwargs)
    objective.check_base(base)
    _check_loaded(base, info, name_or_path, may_be_new, bool(objective.base_options.get("freeze_head")))
    return base


def wrap(
    base: nn.Module,
    objective: Objective,
    *,
    train: str | Moving = "registers",
    lora: Mapping[str, Any] | None = None,
    **options: Any,
) -> PeftModel:
    """Give a base registers, or what else is to move, and train with it the heads that the objective trains.

    Args:
        base: From :func:`load_base`, or any model of that kind.
        objective: What it is trained on.
        train: What moves, such as ``"registers+lora"``; see :class:`Moving`.
        lora: Arguments of ``peft.LoraConfig``; default rank 8, alpha 16.
        **options: Arguments of :class:`RegisterConfig`.

    Returns:
        A :class:`RegisterPeftModel` if only registers move, otherwise a :class:`ComposedPeftModel`.

    Raises:
        ValueError: The base lacks something that the objective needs, or that is to move.
    """
    objective.check_base(base)
    moving = Moving.parse(train) if isinstance(train, str) else train
    heads = list(dict.fromkeys([*(options.pop("modules_to_save", None) or []), *objective.heads]))
    return put_on(base, moving, options, lora, heads)


def _load_classifier(
    name_or_path: str, *, labels: Sequence[str] | None, head: str, freeze_head: bool, **kwargs: Any
) -> Loaded:
    """``AutoModelForImageClassification`` with a head for the data set's classes.

    Raises:
        ValueError: transformers has no class with a head for the model.
    """
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    remote = "AutoModelForImageClassification" in (getattr(config, "auto_map", None) or {})
    if not remote and type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{name_or_path} ({type(config).__name__}) has no class with a head for images in transformers; train "
            "without labels (--objective distillation), or on a checkpoint that has one: of CLIP and SigLIP the whole "
            "model"
        )
    own = [config.id2label[index] for index in sorted(config.id2label)]
    labels = own if freeze_head or labels is None else list(labels)
    if labels != own:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    model, info = AutoModelForImageClassification.from_pretrained(
        name_or_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
    )
    # A head that is trained may be missing from the checkpoint or have another shape there; nothing else may.
    return model, info, () if freeze_head else (f"{head}.",)


def _load_backbone(name_or_path: str, **kwargs: Any) -> Loaded:
    """``AutoModel``; of a model with two towers the vision tower alone."""
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        kwargs["config"] = config.vision_config
    with _quiet():  # the weights of a text tower or a head are left out on purpose
        model, info = AutoModel.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    if any(key.startswith("pooler.") for key in info["missing_keys"]):
        model.pooler = None  # a classifier's checkpoint has none, and a random one says nothing
    return model, info, ("pooler.",)


def _load_image_text(name_or_path: str, **kwargs: Any) -> Loaded:
    """``AutoModel`` with both towers, as CLIP and SigLIP have them.

    Raises:
        ValueError: The model has no text tower.
    """
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    model, info = None, {}
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        model, info = AutoModel.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    if model is None or not has_both_towers(model):
        raise ValueError(
            f"{name_or_path} ({type(config).__name__}) does not embed images and texts side by side; texts need a "
            "model that does, such as CLIP or SigLIP"
        )
    return model, info, ()


@contextmanager
def _quiet() -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _check_loaded(
    model: nn.Module, info: dict[str, Any], name_or_path: str, may_be_new: tuple[str, ...], frozen_head: bool
) -> None:
    """Refuse a model some of whose weights are new ones.

    Raises:
        ValueError: It has such weights, beside those whose names begin with one of ``may_be_new``.
    """
    lost = {key for key in info["missing_keys"] if not key.startswith(may_be_new)}
    # transformers 4 gives the keys alone, 5 their shapes too.
    misshapen = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    lost |= {key for key in misshapen if not key.startswith(may_be_new)}
    if lost:
        advice = "" if not frozen_head else "A frozen head must be in the checkpoint: leave --freeze-head out, or "
        raise ValueError(
            f"{name_or_path} has no fitting weights for {sorted(lost)[:6]} of {type(model).__name__}; training "
            f"would build on random values. {advice or 'Please '}choose another checkpoint."
        )


#: Kind of base to its loader; an objective names one of them.
BASES: dict[str, Callable[..., Loaded]] = {
    "backbone": _load_backbone,
    "classifier": _load_classifier,
    "image_text": _load_image_text,
}
