"""The offsets, and how they reach whoever reads the position embeddings.

A tower reads its position embeddings as an attribute, interpolates them for another image size, slices them, adds them:
every family in its own way. So the attribute itself is what moves. Its owner (the embedding layer, the
``nn.Embedding``, timm's whole tower) gets a class of its own, in which the attribute is a property: the frozen
parameter plus the active offsets. The parameter stays where it is, under its own key, and nothing is swapped during a
pass, which another thread could see.

PEFT's own ways do not reach it: ``target_parameters`` wraps the owner and has ranks, ``TrainableTokens`` knows
``nn.Embedding`` alone, and a copied module (``modules_to_save``) would train the patch embedding too. torch's
``parametrize`` renames the parameter, and its classes are neither pickled nor independent of a copy's.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ...errors import UnsupportedModelError
from .._peft_compat import POSITIONS
from ..registers import ByAdapter
from ..undo import Before, check_arrived, is_transformers

__all__ = ["CHILD", "PositionLayer"]

#: Name of the layer in the module that owns the position embeddings.
CHILD = POSITIONS


class _Offsets(nn.Module):
    """One adapter's offsets, a module of their own: replicas of ``DataParallel`` have no dictionaries of parameters."""

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(like))
        #: Whether offsets that are not all zero are to come from a file.
        self.awaited = False

    @property
    def pending(self) -> bool:
        """Whether what is to come from a file is not here."""
        return self.awaited and (self.weight.is_meta or not bool(self.weight.any()))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` plus the offsets; it is called, so that what offloads modules brings them."""
        if self.weight.is_meta:  # they wait for their file
            return values
        if values.shape != self.weight.shape:
            raise UnsupportedModelError(
                f"the position embeddings have the shape {list(values.shape)}, and the offsets of an adapter "
                f"{list(self.weight.shape)}: another parameter was put in their place, of another grid. Put the old "
                "one back, or take the adapters off with unload()."
            )
        return values + self.weight


class PositionLayer(nn.Module, BaseTunerLayer):
    """Adds the active adapters' offsets to the position embeddings of one tower; a child of the module that owns them.

    Args:
        owner: The module whose parameter they are.
        name: Name of the parameter there, of any shape.
    """

    adapter_layer_names = (f"{POSITIONS}_values",)

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        # In a tuple, which makes no submodule of it: it holds this layer.
        self._place = (owner, name)
        self._frozen: torch.Tensor | None = None
        self.offset_positions_values = ByAdapter()
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        #: The model before it got an adapter whose values are still to come from a file.
        self.before: Before | None = None

    @property
    def place(self) -> tuple[nn.Module, str]:
        """The module whose parameter the position embeddings are, and its name there."""
        return self._place

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters with offsets."""
        return list(self.offset_positions_values)

    @property
    def base(self) -> nn.Parameter:
        """The frozen position embeddings."""
        owner, name = self._place
        return cast(nn.Parameter, owner._parameters[name])

    @property
    def weight(self) -> torch.Tensor:
        """Nothing: PEFT asks a layer for what it wraps."""
        raise AttributeError("a PositionLayer wraps no weight")

    @property
    def bias(self) -> torch.Tensor:
        """As for ``weight``."""
        raise AttributeError("a PositionLayer wraps no bias")

    def update_layer(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Add offsets of one adapter, zeros, and make it the active one if it is the first."""
        self.offset_positions_values[adapter_name] = _Offsets(self.base.detach())
        super().set_adapter(self._active or [adapter_name], inference_mode=inference_mode)

    def train(self, mode: bool = True) -> PositionLayer:
        """As for any module; loaders call ``eval()`` once the weights are in, so this is where missing ones are found.

        Raises:
            AdapterFileError: transformers has put an adapter on, and its offsets or heads have not come in.
        """
        # A list: another thread may delete one.
        for name, offsets in list(self.offset_positions_values.items()) if is_transformers(self.before) else ():
            check_arrived(offsets, name, self.before, "position")
        self.before = None
        super().train(mode)
        return self

    @property
    def _active(self) -> list[str]:
        return [name for name in cast("list[str]", self.active_adapters) if name in self.offset_positions_values]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The position embeddings with the active offsets, in the shape and dtype of ``values``."""
        if self.merged and self.disable_adapters:
            self.unmerge()
        if self.merged or self.disable_adapters:
            return values
        return self._moved(values, self._active)

    def _moved(self, values: torch.Tensor, names: list[str]) -> torch.Tensor:
        moved = values
        for name in names if not values.is_meta else ():  # those of a module that is offloaded come when it is called
            moved = self.offset_positions_values[name](moved)
        return moved.to(values.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add offsets to the position embeddings.

        Args:
            safe_merge: Check first that the sum is finite.
            adapter_names: Names of the adapters, default the active ones.

        Raises:
            ValueError: ``safe_merge`` and it is not.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.offset_positions_values]
        if not names:
            return
        with torch.no_grad():
            moved = self._moved(self.base, names)
            if safe_merge and not moved.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
            if self._frozen is None:  # subtracting would leave a rounding error
                self._frozen = self.base.detach().clone()
            self.base.copy_(moved)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Put back the position embeddings as they were before the first merge."""
        if self._frozen is not None:
            with torch.no_grad():
                self.base.copy_(self._frozen)
        self._frozen, self.merged_adapters = None, []

    def attach(self) -> None:
        """Become a child of the owner, whose attribute reads through this layer from now on."""
        owner, name = self._place
        kind: Any = type(owner)
        owner.add_module(CHILD, self)
        owner.__class__ = _reading_through(kind, name)

    def move_to(self, owner: nn.Module) -> None:
        """Add the offsets to the position embeddings of another owner, which somebody has put in the place of its own.

        Raises:
            UnsupportedModelError: It has none of this shape, or the offsets were merged into those that are gone.
        """
        before, name = self._place
        values: Any = owner._parameters.get(name)
        shape = next((tuple(cast(_Offsets, kept).weight.shape) for kept in self.offset_positions_values.values()), None)
        if shape is None:
            return
        found = None if values is None else tuple(values.shape)
        if self.merged or found != shape:
            what = "which they were merged into" if self.merged else f"of shape {list(shape)}"
            raise UnsupportedModelError(
                f"the position embeddings {what}, that the adapters {list(self.offset_positions_values)} move, were "
                f"replaced with {type(owner).__name__}, whose {name!r} has the shape {list(found or ())}. Put the old "
                f"{type(before).__name__} back, or take the adapters off with unload()."
            )
        self.detach()
        self._place = (owner, name)
        self.attach()

    def detach(self) -> None:
        """Undo :meth:`attach`; what was merged stays in the position embeddings."""
        owner, _ = self._place
        owner._modules.pop(CHILD, None)
        before = vars(type(owner)).get(_BEFORE)
        if before is not None:  # a class that somebody made from it since then reads what is there without this layer
            owner.__class__ = before


_BEFORE = "_without_offsets"


@cache
def _reading_through(kind: Any, name: str) -> Any:
    """A class like ``kind``, with its name, in which reading ``name`` goes through the layer.

    Instances of ``kind`` can become ones of it; they are copied and pickled as such.
    """

    def read(module: nn.Module) -> Any:
        values = module._parameters.get(name)
        if values is None:  # replicas of DataParallel have plain tensors
            values = module.__dict__[name]
        layer = module._modules.get(CHILD)
        return values if layer is None else layer(values)

    def write(module: nn.Module, value: Any) -> None:
        module.__dict__[name] = value

    def reduce(module: nn.Module, protocol: Any) -> Any:
        _, _, *state = super(made, module).__reduce_ex__(protocol)
        return (_blank, (kind, name), *state)

    content = {
        name: property(read, write),
        _BEFORE: kind,
        "__reduce_ex__": reduce,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    made: Any = type(kind)(kind.__name__, (kind,), content)
    return made


def _blank(kind: Any, name: str) -> Any:
    """An empty instance, which its state fills."""
    made = _reading_through(kind, name)
    return made.__new__(made)
