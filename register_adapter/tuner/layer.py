"""The tuner layer: a sibling module of the embeddings that inserts registers into the sequence and takes them out.

It sits beside the embeddings (``tower.registers``) and works through hooks that are its own bound methods. A wrapper
around the embeddings would rename the base's keys, and a closure would make a deep copy share the original's registers.
"""

from __future__ import annotations

import inspect
import warnings
from itertools import chain
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..towers.identity import TowerIdentity, brings_biases, identity_now, trains_biases
from ..towers.tower import Tower
from ..utils.parameters import check_module
from ._peft_compat import POSITIONS, activate_heads, enable_heads, member
from .config import RegisterConfig
from .heads import HeadLabels
from .hooks.call_state import CallState
from .hooks.choice import BASE, Choice
from .hooks.fitting import misfit
from .hooks.methods import MethodHooks
from .hooks.neurons import NeuronHooks
from .hooks.place import PlaceHooks
from .hooks.recomputation import Inputs, drop
from .hooks.recording import show_hooks_to_compiler
from .hooks.sequence import SequenceHooks
from .registers import ByAdapter, Placement, RegisterTokens, refuse_merging
from .undo import Before, check_arrived, refuse_without_values

__all__ = [
    "BASE",
    "RegisterLayer",
    "attached_layers",
    "find_register_layer",
    "register_layers",
    "renew_bases",
    "require_register_layer",
]


class RegisterLayer(SequenceHooks, Choice, MethodHooks, NeuronHooks, PlaceHooks, nn.Module, BaseTunerLayer):
    """Register tokens of one or more adapters on one vision tower.

    Args:
        tower: The tower; the layer keeps its place, not its weights.
    """

    register_adapter_tokens: nn.ModuleDict
    adapter_layer_names: tuple[str, ...] = ("register_adapter_tokens",)
    #: PEFT's ``disable_input_dtype_casting`` sets it; registers follow the sequence's dtype, not the other way round.
    cast_input_dtype_enabled = True
    other_param_names: tuple[str, ...] = ("placements", "labels", "bases")

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self.prefix = tower.prefix
        self.register_adapter_tokens = ByAdapter()
        self.placements: dict[str, Placement] = {}
        self.labels = HeadLabels()
        #: Adapter name to the identity that the tower had when the adapter was attached, or last saved.
        self.bases: dict[str, TowerIdentity] = {}
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self._aside = 0
        self.merged_adapters: list[str] = []
        self._handles: list[Any] = []
        self._hooked: list[Any] = []
        self._kinds: tuple[Any, ...] = ()
        self.misfits: dict[str, str] = {}
        self._configs: list[tuple[nn.Module, Any]] = []
        self.call = CallState()
        self.inputs = Inputs()
        #: Of a replica that DataParallel makes: the adapters that the thread which makes it has set aside.
        self.asked: frozenset[str] = frozenset()
        #: The model before it got an adapter whose values are still to come from a file.
        self.before: Before | None = None
        parameters = list(inspect.signature(type(tower.module).forward).parameters)[1:]
        self._mask_position = parameters.index("attention_mask") if "attention_mask" in parameters else None

    @property
    def weight(self) -> torch.Tensor:
        """PEFT asks tuner layers for the weight they wrap; this one wraps none."""
        raise AttributeError("a RegisterLayer wraps no weight")

    @property
    def bias(self) -> torch.Tensor:
        """As for ``weight``."""
        raise AttributeError("a RegisterLayer wraps no bias")

    def update_layer(self, adapter_name: str, config: RegisterConfig, pending: bool = False) -> None:
        """Add the registers of one adapter.

        Args:
            adapter_name: Name of the adapter.
            config: Its configuration.
            pending: The values are to come from a file.
        """
        placement = config.placement
        blocks = len(self.tower.part("blocks"))
        weight = self._initial_values(config, placement.shape(self.tower.hidden_size, blocks), pending)
        gate = None
        if config.gate is not None:
            fill = torch.nan if pending else config.gate
            gate = torch.full((blocks - config.insert_layer, config.num_registers), float(fill))
        self.register_adapter_tokens[adapter_name] = tokens = RegisterTokens(weight, pending, gate)
        if config.register_neurons:
            tokens.add_neurons(config.register_neurons, config.remove, config.train_removal, pending)
        self.placements[adapter_name] = placement
        self._move_adapter_to_device_of_base_layer(adapter_name)
        neighbour = self._neighbour
        if neighbour.is_floating_point() and not neighbour.is_meta:
            self.register_adapter_tokens[adapter_name].to(neighbour.dtype)

    @property
    def _neighbour(self) -> torch.Tensor:
        """A parameter of the base whose dtype and device the registers share: the embeddings', if they have one."""
        embeddings: nn.Module = self.tower.part("embeddings")
        return next(chain(embeddings.parameters(), self.tower.module.parameters()))

    def _initial_values(self, config: RegisterConfig, shape: tuple[int, ...], pending: bool) -> torch.Tensor:
        if pending:
            return torch.full(shape, torch.nan)
        if config.init in ("test_time", "outliers"):  # what they hold comes from the neurons, or is filled in next
            return torch.zeros(shape)
        if config.init == "zeros":
            warnings.warn(
                "init='zeros': equal registers get equal gradients and stay equal for ever; use init='normal'",
                stacklevel=2,
            )
            return torch.zeros(shape)
        values = torch.randn(shape) * config.init_std  # on the CPU: a seed gives the same registers on every device
        if config.init == "cls":
            cls = self.tower.part("cls_token")
            values = values + cls.detach().to(values.device, values.dtype).reshape(1, -1)
        return values

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT asks every layer, also those that are of other adapters.
        if adapter_name not in self.names:
            return
        target = device or self._neighbour.device
        tokens = self.tokens(adapter_name)
        if target.type != "meta" and not tokens.weight.is_meta:
            tokens.to(target)

    @property
    def names(self) -> list[str]:
        """Names of the adapters."""
        return list(self.register_adapter_tokens.keys())

    def train(self, mode: bool = True) -> RegisterLayer:
        """As for any module; loaders call ``eval()`` once the weights are in, so this is where missing ones are found.

        Raises:
            AdapterFileError: No finite values have come in from an adapter's file, or not those of its heads.
        """
        for name, tokens in list(self.register_adapter_tokens.items()):  # another thread may delete one
            check_arrived(cast(RegisterTokens, tokens), name, self.before)
        self.before = None
        super().train(mode)
        return self

    _refuse = staticmethod(refuse_without_values)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; the last adapter takes the hooks with it."""
        was_active = adapter_name in self.active_names
        self.labels.renew()  # as long as it has the adapter: names that were given to its classes go with it
        if self.names == [adapter_name]:
            self._leave_behind()
        super().delete_adapter(adapter_name)
        if was_active:
            activate_heads(self.labels.model or self.tower.module, adapter_name, self.active_names)
        self.show_labels()
        if not self.names:
            self._remove_hooks()

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; the model's config names the classes of the head that is at work."""
        super().set_adapter(*args, **kwargs)
        self.show_labels()

    def enable_adapters(self, enabled: bool) -> None:
        """As in PEFT; see :meth:`set_adapter`."""
        super().enable_adapters(enabled)
        if enabled:
            enable_heads(self.labels.model or self.tower.module, self.names)
        self.show_labels()

    def _replicate_for_data_parallel(self) -> RegisterLayer:
        replica: RegisterLayer = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.asked = self.call.without
        return replica

    def show_labels(self) -> None:
        """Have the model's config name the classes of the active adapter's head, if it is not left out."""
        active = [] if self.disable_adapters else [name for name in self.active_names if name not in self.call.without]
        self.labels.show(next((name for name in active if name in self.labels), None))

    def renew_bases(self) -> None:
        """Have the adapters' configs name the base as it is now, if its weights were loaded after they were attached.

        And the classes of a head as the model's config has them. What other adapters have trained or merged is no
        other base.
        """
        self.labels.renew()
        configs: dict[str, Any] = getattr(self.labels.model, "peft_config", {})
        trained = brings_biases(self.labels.model)
        # What was merged or deleted has left its flags behind, and is the base's now: no adapter brings it along.
        blocks = self.tower.part("blocks")
        rest = [config for config in configs.values() if not isinstance(config, RegisterConfig)]
        others = any(config.peft_type != member(POSITIONS) for config in rest)  # these train no bias
        inside = set(map(id, blocks.modules()))
        whole = (self.labels.model or self.tower.module).modules()
        wrappers = [part for part in whole if isinstance(part, AuxiliaryTrainingWrapper)]  # in the blocks, or around
        others = others or any(not inside.isdisjoint(map(id, part.modules())) for part in wrappers)
        trained = trained or (others and trains_biases(self.tower))
        for name, before in list(self.bases.items()):
            config = configs.get(name)
            if not isinstance(config, RegisterConfig):
                continue
            now = identity_now(self.tower, before, biases=not trained)
            if now is None:
                continue
            by_block = config.deep or config.key_value or config.gate is not None
            if by_block and now.num_hidden_layers != before.num_hidden_layers:
                continue  # blocks were cut off; the file still has tensors for all
            config.base_tower, self.bases[name] = now.to_dict(), now

    def attach(self) -> None:
        """Become ``tower.registers`` and register the hooks that the adapters need."""
        module = self.tower.module
        if getattr(module, "registers", None) is not self:
            module.add_module("registers", self)
        # Another adapter of the same kind needs no other hooks; those that are there may be at work in a thread.
        kinds = (self._by_block, self._in_attention, self._neuron_blocks, self.labels.model)
        if self._handles and kinds == self._kinds and self._is_hooked(self._all_points()):
            self.misfits = {name: sentence for name in self.names if (sentence := self._misfit(name))}
            return
        self._kinds = kinds
        show_hooks_to_compiler()
        attending = self._in_attention or bool(self._configs)
        self._remove_hooks()
        self._handles = self._sequence_hooks()
        self._handles += self._neuron_hooks(self._neuron_blocks) + self._place_hooks()
        self._wrap_methods()
        if attending:
            self._enter_attention()
        self._hooked = self._all_points()
        self.misfits = {name: sentence for name in self.names if (sentence := self._misfit(name))}

    def _misfit(self, name: str) -> str | None:
        tokens, placement = self.tokens(name), self.placements[name]
        attends = placement.key_value or tokens.gate is not None
        return misfit(self.tower, placement, attends, set(tokens.slices), tokens.num_blocks)

    def _all_points(self) -> list[Any]:
        points = self._hook_points()
        if self._neuron_blocks:
            points += self._neuron_points()
        return points + self._attention_points() if self._in_attention or self._configs else points

    def detach(self) -> None:
        """Undo :meth:`attach`; the tower is as it was before."""
        if self._handles:
            self._leave_behind()
        self._remove_hooks()
        self.labels.show(None)
        del self.tower.module._modules["registers"]

    def _remove_hooks(self) -> None:
        if self._handles:
            self._drop_copies()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._unwrap_methods()
        self._leave_attention()
        drop(self.tower.module, self)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: PEFT calls every method's layers when LoRA's are merged, and registers stay at work beside them.

        Raises:
            NotImplementedError: ``adapter_names`` names registers.
        """
        if not set(self.names).isdisjoint(adapter_names or ()):
            refuse_merging()

    def unmerge(self) -> None:
        """Nothing, as nothing was merged."""


def find_register_layer(model: nn.Module) -> RegisterLayer | None:
    """The layer that holds a model's registers, the first of them if several towers have some, ``None`` if none has."""
    return next(iter(register_layers(model)), None)


def require_register_layer(model: nn.Module) -> RegisterLayer:
    """The layer that holds a model's registers.

    Raises:
        ValueError: The model has no registers.
    """
    layer = find_register_layer(model)
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no registers; give it some with add_registers(model)")
    return layer


def renew_bases(model: nn.Module) -> None:
    """Before a save: see :meth:`RegisterLayer.renew_bases`.

    Raises:
        UnsupportedModelError: A tower was replaced, and registers that are to be saved are not in the model any more.
    """
    for layer in attached_layers(model):
        layer.check_place(model)
        layer.renew_bases()


def register_layers(model: nn.Module) -> list[RegisterLayer]:
    """All layers with registers in a model, one per tower."""
    check_module(model)
    return [module for module in model.modules() if isinstance(module, RegisterLayer)]


def attached_layers(model: nn.Module) -> list[RegisterLayer]:
    """Those of :func:`register_layers`, and layers whose tower somebody has replaced: their hooks are still there."""
    # In lists, because another thread may put on hooks of its own meanwhile (capture).
    hooks = [hook for module in model.modules() for hook in list(module._forward_pre_hooks.values())]
    owners = (getattr(getattr(hook, "func", hook), "__self__", None) for hook in hooks)
    modules = set(model.modules())
    # The copy of a hooked module has hooks of a copy of its layer, with a whole model of its own.
    replaced = [own for own in owners if isinstance(own, RegisterLayer) and own.labels.model in {None, *modules}]
    return list(dict.fromkeys([*register_layers(model), *replaced]))
