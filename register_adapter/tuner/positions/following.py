"""Offsets follow when somebody replaces the module that owns the position embeddings, or the tower."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from ...errors import UnsupportedModelError
from .layer import CHILD, PositionLayer

__all__ = ["Walked", "find_again", "follow", "position_layers", "take_off"]

# Two threads may run the first pass behind a replacement.
_MOVING = threading.RLock()


class _Follower:
    """A forward pre-hook of a module above the owner: where the owner is another one now, the layer moves there.

    Args:
        path: Dotted name of the owner, below the module that has this hook.
        layer: The owner's layer.
    """

    def __init__(self, path: str, layer: PositionLayer) -> None:
        self.path, self.layer = path, layer

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Find the owner, and the layer in it.

        Raises:
            UnsupportedModelError: What is there now has no such position embeddings, or cannot be looked into.
        """
        try:
            owner = module.get_submodule(self.path)
        except AttributeError:  # something stands in between that gives no access, with the owner of before or another
            if self.layer.adapters and not any(isinstance(part, PositionLayer) for part in module.modules()):
                raise UnsupportedModelError(
                    f"the adapters {self.layer.adapters} move position embeddings in {self.path!r} of "
                    f"{type(module).__name__}, which is not there any more: what is on the way to it was replaced. Put "
                    "it back, or take the adapters off with unload()."
                ) from None
            return
        there = owner._modules.get(CHILD)
        if isinstance(there, PositionLayer):
            if there is not self.layer and not getattr(module, "_is_replica", False):
                self.layer = there  # the owner is a copy, with a layer of its own
            return
        with _MOVING:
            wrapped = any(part is self.layer for part in owner.modules())
            if not wrapped and not isinstance(owner._modules.get(CHILD), PositionLayer):
                self.layer.move_to(owner)


def follow(model: nn.Module, layer: PositionLayer) -> None:
    """Have a layer follow, in passes of ``model`` and of every module between it and the owner that is called alone."""
    owner, _ = layer.place
    path = next(name for name, module in model.named_modules() if module is owner)
    parts = path.split(".") if path else []
    for depth in range(len(parts)):
        above = model.get_submodule(".".join(parts[:depth]))
        above.register_forward_pre_hook(_Follower(".".join(parts[depth:]), layer))


def position_layers(model: nn.Module) -> list[PositionLayer]:
    """All layers with offsets in a model, one per tower; those whose owner was replaced are put on the new one first.

    Raises:
        UnsupportedModelError: It has no such position embeddings.
    """
    for module, _, follower in _followers(model):
        follower(module)
    return [module for module in model.modules() if isinstance(module, PositionLayer)]


def find_again(model: nn.Module) -> None:
    """Put the layers on owners that have come since, where that works; a pass says where it does not."""
    for module, _, follower in _followers(model):
        with contextlib.suppress(UnsupportedModelError):
            follower(module)


class Walked:
    """A tuner in whose modules whoever walks over them (PEFT's switches, an optimiser) meets the layers that follow."""

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As for any module."""
        self._find_again()
        found: Iterator[tuple[str, nn.Module]] = nn.Module.named_modules(cast(nn.Module, self), *args, **kwargs)
        return found

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As for any module."""
        self._find_again()
        return nn.Module.state_dict(cast(nn.Module, self), *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._find_again()  # before torch goes on to the modules in it
        nn.Module._load_from_state_dict(cast(nn.Module, self), *args, **kwargs)

    def _find_again(self) -> None:
        base = cast(nn.Module, self)._modules.get("model")
        if base is not None:
            find_again(base)


def take_off(model: nn.Module) -> None:
    """Take all layers off their owners, replaced ones too; nothing follows any more."""
    layers = [module for module in model.modules() if isinstance(module, PositionLayer)]
    for module, key, follower in _followers(model):
        layers.append(follower.layer)
        del module._forward_pre_hooks[key]
    for layer in layers:
        layer.detach()


def _followers(model: nn.Module) -> list[tuple[nn.Module, int, _Follower]]:
    # Lists, because another thread may put on hooks of its own meanwhile.
    hooks = [(module, key, hook) for module in model.modules() for key, hook in list(module._forward_pre_hooks.items())]
    return [(module, key, hook) for module, key, hook in hooks if isinstance(hook, _Follower)]
