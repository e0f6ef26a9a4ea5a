"""The part of the native export that knows timm: the same model, with more ``reg_token``.

timm (https://github.com/huggingface/pytorch-image-models) puts ``reg_token`` between CLS and patches; a model that adds
its position embeddings after that gets rows of zeros for the new ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..errors import MissingExtraError, UnsupportedModelError
from ..tuner.heads import name_classes
from ..tuner.layer import RegisterLayer
from .subject import OTHER_FORMS, Subject
from .whole import model_folder

__all__ = ["export_timm", "is_timm", "save_timm"]

# Class of timm -> its constructor's argument for the number of registers. No subclass: those change the prefix tokens.
_ARGUMENTS = {"VisionTransformer": "reg_tokens", "Eva": "num_reg_tokens"}


def is_timm(tower: nn.Module) -> bool:
    """Whether a tower is a class of timm's."""
    return type(tower).__module__.startswith("timm.")


def export_timm(subject: Subject) -> nn.Module:
    """A copy of the model in which the active registers are timm's own.

    Raises:
        UnsupportedModelError: The class has no registers of its own, or a norm between them and the first block.
    """
    tower: Any = subject.tower
    name = type(tower).__name__
    if name not in _ARGUMENTS:
        raise UnsupportedModelError(f"timm's {name} has no reg_tokens; {', '.join(_ARGUMENTS)} have. {OTHER_FORMS}")
    if not isinstance(tower.norm_pre, nn.Identity):
        raise UnsupportedModelError(
            f"this {name} normalises its tokens before the first block (pre_norm), where native registers go in before "
            f"and the adapter's behind the norm: no values of reg_tokens are equivalent. {OTHER_FORMS}"
        )
    base = copy.deepcopy(subject.base)
    plain: Any = base.get_submodule(subject.path)
    _strip(base)
    _add_registers(plain, subject, _ARGUMENTS[name])
    config: Any = getattr(base, "config", None)
    given: Any = getattr(subject.base, "config", None)
    if hasattr(given, "id2label"):  # of a trained head; the copy has the base's again
        name_classes(base, dict(given.id2label), dict(given.label2id or {}))
    if hasattr(config, "model_args"):  # transformers' wrapper makes the model anew from it
        config.model_args = {**(config.model_args or {}), _ARGUMENTS[name]: plain.reg_token.shape[1]}
    return base.requires_grad_(True).eval()


def _strip(model: nn.Module) -> None:
    """Take every trace of PEFT off a copy: registers, hooks, heads' wrappers, configs."""
    for layer in [module for module in model.modules() if isinstance(module, RegisterLayer)]:
        layer.detach()
    for path, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            owner, _, child = path.rpartition(".")
            setattr(model.get_submodule(owner), child, module.modules_to_save[module.active_adapter])
    for module in model.modules():
        module.__dict__.pop("peft_config", None)


def _add_registers(tower: Any, subject: Subject, argument: str) -> None:
    """Give a stripped tower the subject's registers, behind those that it has."""
    values = subject.registers(next(p for p in tower.parameters() if p.shape[-1] == tower.embed_dim)).unsqueeze(0)
    if tower.reg_token is not None:
        values = torch.cat([tower.reg_token.detach(), values], dim=1)
    added = sum(segment.count for segment in subject.segments)
    prefix = subject.layer.prefix
    if tower.pos_embed is not None and not tower.no_embed_class:
        positions = tower.pos_embed.detach()
        rows = positions.new_zeros(1, added, positions.shape[-1])
        tower.pos_embed = nn.Parameter(torch.cat([positions[:, :prefix], rows, positions[:, prefix:]], dim=1))
    tower.reg_token = nn.Parameter(values)
    # Everything that timm's constructors derive from the number of registers.
    for module in tower.modules():
        if hasattr(module, "num_prefix_tokens"):
            module.num_prefix_tokens = prefix + added
    if hasattr(tower, "num_reg_tokens"):
        tower.num_reg_tokens = values.shape[1]
    if hasattr(tower, "cls_embed"):
        tower.cls_embed = False
    if hasattr(tower, "_model_args"):  # what timm remembers of create_model's arguments, for save_for_hf
        tower._model_args = {**tower._model_args, argument: values.shape[1]}


def save_timm(model: nn.Module, folder: Path, model_args: dict[str, Any]) -> None:
    """Save an exported timm model for ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

    Args:
        model: The model.
        folder: The folder.
        model_args: Arguments of ``create_model`` that it was made with, and timm did not remember.

    Raises:
        ValueError: It is not a model of timm's factory, or cannot be made again from its arguments.
        MissingExtraError: timm is not installed.
    """
    name = type(model).__name__
    if name not in _ARGUMENTS or not is_timm(model):
        raise ValueError(
            f"{name} is neither a model of transformers nor a VisionTransformer or Eva of timm: save its state_dict()"
        )
    try:
        import timm
        from timm.models import save_for_hf
    except ImportError as error:
        raise MissingExtraError("timm models", "timm", "timm") from error
    tower: Any = model
    architecture = (getattr(tower, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture:
        raise ValueError(f"this {name} was not made by timm.create_model and has no name there: save its state_dict()")
    known = {key: value for key, value in getattr(tower, "_model_args", {}).items() if value is not None}
    arguments = {**known, **model_args, _ARGUMENTS[name]: tower.reg_token.shape[1]}
    arguments.setdefault("num_classes", tower.num_classes)
    arguments.setdefault("global_pool", tower.global_pool)
    again = _made_again(timm.create_model, architecture, arguments)
    shapes = {key: tuple(value.shape) for key, value in again.items()}
    wanted = {key: tuple(value.shape) for key, value in tower.state_dict().items()}
    if shapes != wanted:
        unlike = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
        raise ValueError(
            f"timm.create_model({architecture!r}, {arguments}) makes another model: {len(unlike)} weights differ, such "
            f"as {unlike[0]!r}. Give the arguments that yours was made with: save_native(..., model_args={{...}})."
        )
    with model_folder(folder) as scratch:
        save_for_hf(model, str(scratch), model_args=arguments, safe_serialization=True)


def _made_again(
    create: Callable[..., nn.Module], architecture: str, arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    try:
        with torch.random.fork_rng(devices=[]):
            return create(architecture, pretrained=False, **arguments).state_dict()
    except TypeError as error:
        raise ValueError(f"timm.create_model({architecture!r}, {arguments}) failed: {error}") from error
