"""Whether a tower with registers is still where they were added: another one in its place has no hooks."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

from torch import nn

from ...errors import UnsupportedModelError
from ...towers.anatomy import resolve
from ..heads import HeadLabels
from .base import LayerHooks
from .stand_in import StandIn

__all__ = ["PlaceHooks"]


#: Methods of models, of transformers or OpenCLIP, that call a tower past the model's forward.
METHODS = ("get_image_features", "get_image_embeddings", "get_multimodal_features", "encode_image")
_REPLICATE = "_replicate_for_data_parallel"


class _Method:
    """Stands in for a method of one module, by an attribute of its own; removed like a hook."""

    def __init__(self, owner: Any, name: str, stand_in: Any) -> None:
        self.owner, self.name, self.stand_in = owner, name, stand_in
        owner.__dict__[name] = stand_in
        owner.__dict__[_REPLICATE] = partial(_replicate, owner)

    def remove(self) -> None:
        """Have the class's method back, unless somebody has put another one there since."""
        for name in (self.name, _REPLICATE):
            value = vars(self.owner).get(name)
            if value is self.stand_in or getattr(value, "func", None) is _replicate:
                del self.owner.__dict__[name]


def _replicate(owner: Any) -> Any:
    """As torch's, for DataParallel: a replica's methods are its class's."""
    replica = type(owner)._replicate_for_data_parallel(owner)
    del replica.__dict__[_REPLICATE]
    for name in METHODS:
        function = getattr(vars(replica).get(name), "func", None)
        if getattr(function, "__func__", None) is PlaceHooks._call_around:
            del replica.__dict__[name]
    return replica


class PlaceHooks(LayerHooks):
    """Hooks of a :class:`RegisterLayer` on the modules around its tower; mixed into it."""

    labels: HeadLabels

    @property
    @abstractmethod
    def active_names(self) -> list[str]:
        """Names of the active adapters."""

    @property
    @abstractmethod
    def disable_adapters(self) -> bool:
        """Whether no adapter takes part in this thread's passes."""

    def _place_hooks(self) -> list[Any]:
        """Hooks on the model and on every module between it and the tower: any of them may be called."""
        model = self.labels.model
        if model is None or model is self.tower.module:
            return []
        path = self.tower.path
        if resolve(model, path) is not self.tower.module:  # it was found in a part of this model
            path = next((name for name, part in model.named_modules() if part is self.tower.module), path)
        steps = path.split(".")
        around = [(resolve(model, ".".join(steps[:n])) if n else model, ".".join(steps[n:])) for n in range(len(steps))]
        handles: list[Any] = []
        for module, rest in around:
            if isinstance(module, nn.Module):
                handles.append(module.register_forward_pre_hook(partial(self._place_hook, rest)))
                handles += [
                    _Method(module, name, StandIn.of(module, name, self._call_around, rest, name, module))
                    for name in METHODS
                    if hasattr(type(module), name) and name not in vars(module)
                ]
        return handles

    def _call_around(self, path: str, name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a method that reaches the tower past ``owner``'s forward."""
        self._place_hook(path, owner, args)
        return getattr(type(owner), name)(owner, *args, **kwargs)

    def _place_hook(self, path: str, module: nn.Module, args: Any) -> None:
        tower = self.tower.module
        # A replica of DataParallel's is made for one pass, from a model that is whole.
        if resolve(module, path) is tower or getattr(module, "_is_replica", False) or self.disable_adapters:
            return
        active = [name for name in self.active_names if name in self._held]
        # What wraps a tower (torch.compile, FSDP) stands in its place.
        if active and not self.is_in(module):
            self.refuse_replaced(active[0])

    @property
    def _held(self) -> list[str]:
        """Adapters of this layer's that the model still has: PEFT deletes them where it finds the layer."""
        known = getattr(self.labels.model, "peft_config", {})
        return [name for name in self.names if name in known]

    def is_in(self, model: nn.Module) -> bool:
        """Whether the tower is a part of ``model``."""
        return any(part is self.tower.module for part in model.modules())

    def check_place(self, model: nn.Module) -> None:
        """The tower is in ``model``, or the model has no adapter of this layer's any more.

        Raises:
            UnsupportedModelError: It was replaced.
        """
        if self._held and not self.is_in(model):
            self.refuse_replaced(self._held[0])

    def refuse_replaced(self, name: str) -> None:
        """Say that the tower with the registers of adapter ``name`` was replaced."""
        raise UnsupportedModelError(
            f"the tower {type(self.tower.module).__name__} at {self.tower.path!r}, which has the registers of {name!r}"
            f", is no longer in {type(self.labels.model).__name__}. Was it replaced after the registers were added? "
            f"Put it back, or call delete_adapter({name!r}) and add registers to the new one."
        )
