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
from torch import nn

from .anatomy import Tower
from .config import RegisterConfig
from .errors import AdapterFileError
from .tokens import cut_tokens, grow_mask, insert_tokens

__all__ = ["RegisterLayer", "RegisterTokens"]


class RegisterTokens(nn.Module):
    """The registers of one adapter, in a module that is called, so that offloading hooks bring them to the device.

    Args:
        weight: Initial values, ``(R, D)``.
        pending: The values are to come from a file; until finite ones are here the registers take no part in the
            forward pass.
    """

    def __init__(self, weight: torch.Tensor, pending: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self._pending = pending

    @property
    def pending(self) -> bool:
        """Whether the values from the file are still to come; the first finite ones settle it."""
        if self._pending and not self.weight.is_meta:
            self._pending = not bool(torch.isfinite(self.weight).all())
        return self._pending

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Registers for a batch, ``(B, R, D)``, in the dtype and on the device of ``hidden_states`` ``(B, N, D)``."""
        return self.weight.to(hidden_states).expand(hidden_states.shape[0], -1, -1)


class RegisterLayer(nn.Module, BaseTunerLayer):
    """Register tokens of one or more adapters on one vision tower.

    Args:
        tower: The tower; the layer keeps its place, not its weights.
    """

    register_adapter_tokens: nn.ModuleDict
    adapter_layer_names: tuple[str, ...] = ("register_adapter_tokens",)
    other_param_names: tuple[str, ...] = ("full_attentions",)

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self.prefix = tower.prefix
        self.register_adapter_tokens = nn.ModuleDict()
        self.full_attentions: dict[str, bool] = {}
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._handles: list[Any] = []
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
        self.register_adapter_tokens[adapter_name] = RegisterTokens(self._initial_values(config, pending), pending)
        self.full_attentions[adapter_name] = config.attentions == "full"
        self._move_adapter_to_device_of_base_layer(adapter_name)
        neighbour = self._neighbour
        if neighbour.is_floating_point() and not neighbour.is_meta:
            self.register_adapter_tokens[adapter_name].to(neighbour.dtype)

    @property
    def _neighbour(self) -> torch.Tensor:
        """A parameter of the base whose dtype and device the registers share: the embeddings', if they have one."""
        embeddings: nn.Module = self.tower.part("embeddings")
        return next(chain(embeddings.parameters(), self.tower.module.parameters()))

    def _initial_values(self, config: RegisterConfig, pending: bool) -> torch.Tensor:
        # Drawn on the CPU, so that a seed gives the same registers on every device.
        shape = (config.num_registers, self.tower.hidden_size)
        if pending:
            return torch.full(shape, torch.nan)
        if config.init == "zeros":
            warnings.warn(
                "init='zeros': equal registers get equal gradients and stay equal for ever; use init='normal'",
                stacklevel=2,
            )
            return torch.zeros(shape)
        values = torch.randn(shape) * config.init_std
        if config.init == "cls":
            cls = self.tower.part("cls_token")
            values = values + cls.detach().to(values.device, values.dtype).reshape(1, -1)
        return values

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        target = device or self._neighbour.device
        tokens = self.tokens(adapter_name)
        if target.type != "meta" and not tokens.weight.is_meta:
            tokens.to(target)

    @property
    def names(self) -> list[str]:
        """Names of the adapters."""
        return list(self.register_adapter_tokens.keys())

    @property
    def _active_names(self) -> list[str]:
        return cast("list[str]", self.active_adapters)

    def tokens(self, adapter_name: str) -> RegisterTokens:
        """The registers of one adapter.

        Raises:
            KeyError: There is no adapter of that name.
        """
        return cast(RegisterTokens, self.register_adapter_tokens[adapter_name])

    def train(self, mode: bool = True) -> RegisterLayer:
        """As for any module; loaders call ``eval()`` once the weights are in, so this is where missing ones are found.

        Raises:
            AdapterFileError: No finite values have come in from an adapter's file.
        """
        for name in self.names:
            if self.tokens(name).pending and not self.tokens(name).weight.is_meta:
                self._refuse(name)
        super().train(mode)
        return self

    @staticmethod
    def _refuse(adapter_name: str) -> None:
        raise AdapterFileError(
            f"the adapter {adapter_name!r} got no (finite) register values from its file: the tensor is missing, "
            "damaged, or from a model in which the vision tower has another place. The model behaves as without it. "
            f"Take it off with delete_adapter({adapter_name!r}), and load a whole file with PeftModel.from_pretrained, "
            "which finds the tower in any model."
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; the last adapter takes the hooks with it."""
        super().delete_adapter(adapter_name)
        if not self.names:
            self._remove_hooks()

    @property
    def active_tokens(self) -> list[RegisterTokens]:
        """The active adapters' registers, in the order of activation; none while adapters are disabled.

        Raises:
            AdapterFileError: In training mode, an adapter still waits for its values.
        """
        if self.disable_adapters:
            return []
        active = {name: self.tokens(name) for name in self._active_names if name in self.register_adapter_tokens}
        waiting = [name for name, tokens in active.items() if tokens.pending]
        if waiting and self.training:
            self._refuse(waiting[0])
        return [tokens for name, tokens in active.items() if name not in waiting]

    @property
    def num_active(self) -> int:
        """Number of registers that take part in the forward pass."""
        return sum(tokens.weight.shape[0] for tokens in self.active_tokens)

    @property
    def _cuts_attentions(self) -> bool:
        return not any(self.full_attentions.get(name, False) for name in self._active_names)

    def attach(self) -> None:
        """Become ``tower.registers`` and register the hooks; what is in place already stays."""
        module, anatomy = self.tower.module, self.tower.anatomy
        if getattr(module, "registers", None) is not self:
            module.add_module("registers", self)
        if self._handles:
            return
        remove = self.tower.part("remove")
        self._handles = [
            module.register_forward_pre_hook(self._grow_mask_hook, with_kwargs=True),
            self.tower.part("embeddings").register_forward_hook(self._insert_hook),
            remove.register_forward_pre_hook(self._remove_from_input_hook)
            if anatomy.remove_from == "input"
            else remove.register_forward_hook(self._remove_from_output_hook),
            # A tower that ends where registers leave needs no second cut.
            *([] if remove is module else [module.register_forward_hook(self._tower_output_hook)]),
        ]

    def detach(self) -> None:
        """Undo :meth:`attach`; the tower is as it was before."""
        self._remove_hooks()
        del self.tower.module._modules["registers"]

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _insert_hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        tokens = self.active_tokens
        if not tokens:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        grown = insert_tokens(hidden, [one(hidden) for one in tokens], self.prefix)
        return (grown, *output[1:]) if isinstance(output, tuple) else grown

    def _remove_from_input_hook(self, module: nn.Module, args: Any) -> Any:
        count = self.num_active
        if not count:
            return None
        return cut_tokens(args, self.prefix, count, args[0].shape[1], self._cuts_attentions)

    def _remove_from_output_hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        count = self.num_active
        if not count:
            return None
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        return cut_tokens(output, self.prefix, count, hidden.shape[1], self._cuts_attentions)

    def _tower_output_hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        # What was recorded on the way (hidden_states, attentions) is as long as the last hidden state before the cut.
        last = None if isinstance(output, torch.Tensor) else output[0]
        if not isinstance(last, torch.Tensor) or last.ndim != 3:
            return None
        count = self.num_active
        if not count:
            return None
        return cut_tokens(output, self.prefix, count, last.shape[1] + count, self._cuts_attentions)

    def _grow_mask_hook(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        position = self._mask_position
        positional = args[position] if position is not None and len(args) > position else None
        mask = kwargs.get("attention_mask", positional)
        count = self.num_active if mask is not None else 0
        if not count:
            return None
        grown = grow_mask(mask, self.prefix, count)
        if position is None or "attention_mask" in kwargs:
            return args, {**kwargs, "attention_mask": grown}
        return (*args[:position], grown, *args[position + 1 :]), kwargs

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Registers cannot be merged.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "registers are tokens, not weight deltas: they cannot be merged into the base's weights. Keep the adapter, "
            "take it off with unload(), or export the model with its registers with export_native() (planned)."
        )
