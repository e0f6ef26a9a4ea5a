"""What an anatomy from a file may say: where modules and parameters are, and nothing that is called or set."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .anatomy import Anatomy
from .tower import Tower

__all__ = ["check_fields", "check_parts"]

#: Fields that name attributes to be set, methods to be wrapped, or arguments to be changed.
_POWERS = ("native_registers", "rotary", "pass_methods", "methods", "counted_methods", "method_counter")
_BLOCK = ("attention", "mlp_in", "mlp_up", "mlp_out", "mlp_scale", "position_bias")
_TOWER = (
    *("embeddings", "remove", "blocks", "position_bias", "positions_between", "patch_embedding"),
    *("position_embedding", "cls_token", "final_norm"),
)
_PARAMETERS = ("position_embedding", "cls_token", "mlp_scale")
_PART = re.compile(r"-?\d{1,4}|[A-Za-z][A-Za-z0-9_]{0,99}")
# One blank image is run through the tower to try an anatomy.
_MAX_SIDE, _MAX_VALUES, _MAX_WIDTH, _MAX_PREFIX = 4096, 2**24, 2**20, 1024


def check_fields(anatomy: Anatomy) -> None:
    """Refuse what no file may say, before there is a model.

    Raises:
        ValueError: A field has a power, is not a path of plain names, or is a size without a sensible bound.
    """
    defaults = {item.name: item.default for item in fields(Anatomy)}
    if given := [name for name in _POWERS if getattr(anatomy, name) != defaults[name]]:
        raise ValueError(
            f"an anatomy from a file may name modules and parameters, but {', '.join(given)} name what is set or "
            "called. If you trust it, give it in code: PeftModel.from_pretrained(base, adapter, anatomy=Anatomy(...))"
        )
    for name in {*_TOWER, *_BLOCK}:
        paths = getattr(anatomy, name)
        for path in (paths,) if isinstance(paths, str) else paths or ():
            if not all(_PART.fullmatch(part) for part in path.split(".")):
                raise ValueError(f"{name!r} of an anatomy from a file must be the name of a module, got {path!r:.100}")
    shape = anatomy.input_shape or (1,)
    if not 1 <= len(shape) <= 4 or not all(1 <= side <= _MAX_SIDE for side in shape) or math.prod(shape) > _MAX_VALUES:
        raise ValueError(
            f"'input_shape' of an anatomy from a file must be up to 4 sizes of at most {_MAX_SIDE}, and {_MAX_VALUES} "
            f"values in all, got {shape!r:.100}"
        )
    if not 0 <= anatomy.prefix <= _MAX_PREFIX or not 1 <= (anatomy.hidden_size or 1) <= _MAX_WIDTH:
        raise ValueError(
            f"'prefix' of an anatomy from a file must lie between 0 and {_MAX_PREFIX} and 'hidden_size' between 1 and "
            f"{_MAX_WIDTH}, got {anatomy.prefix!r:.100} and {anatomy.hidden_size!r:.100}"
        )


def check_parts(tower: Tower) -> None:
    """Every path leads to a module or parameter of the tower, or to nothing.

    Raises:
        UnsupportedModelError: One leads to an attribute of another kind, such as a method.
    """
    defaults = {item.name: item.default for item in fields(Anatomy)}
    places: list[tuple[nn.Module, str]] = [(tower.module, name) for name in _TOWER]
    blocks = _resolved(tower.module, "blocks", tower.anatomy.blocks)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise UnsupportedModelError(
            f"the anatomy {tower.anatomy.family!r} from a file names {tower.anatomy.blocks!r} for the blocks, which is "
            f"a {type(blocks).__name__} in {type(tower.module).__name__}, not a list of modules. Nothing was changed."
        )
    places += [(block, name) for block in blocks for name in _BLOCK]
    for root, name in places:
        if getattr(tower.anatomy, name) == defaults[name]:
            continue  # not the file's words
        part = _resolved(root, name, getattr(tower.anatomy, name))
        if isinstance(part, torch.Tensor) and name not in _PARAMETERS:
            raise _refusal(tower, name, "a parameter")


def _resolved(root: nn.Module, name: str, paths: Any) -> Any:
    """What is at the first of the paths that exists, found without leaving the tables of modules and parameters."""
    for path in (paths,) if isinstance(paths, str) else paths or ():
        value: Any = root
        for part in path.split("."):
            value = _child(value, part, name, path)
            if value is None:
                break
        else:
            return value
    return None


def _child(owner: Any, part: str, name: str, path: str) -> Any:
    child: Any = None
    if not isinstance(owner, nn.Module):
        return None
    if part.startswith("-"):
        children = [*owner.children(), None]
        child = children[int(part) - 1] if -int(part) < len(children) else None
    else:
        tables = (owner._modules, owner._parameters, owner._buffers)
        child = next((table[part] for table in tables if part in table), None)
    if child is None and not part.startswith("-") and getattr(owner, part, None) is not None:
        raise UnsupportedModelError(
            f"{name!r} of an anatomy from a file is {path!r}, and {part!r} of {type(owner).__name__} is neither a "
            "module nor a parameter. If you trust it, give it in code: PeftModel.from_pretrained(base, adapter, "
            "anatomy=Anatomy(...)). Nothing was changed."
        )
    return child


def _refusal(tower: Tower, name: str, kind: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name!r} of an anatomy from a file must name a module of {type(tower.module).__name__}, and "
        f"{getattr(tower.anatomy, name)!r} is {kind}. Nothing was changed."
    )
