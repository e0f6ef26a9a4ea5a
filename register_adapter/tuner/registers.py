"""The registers of one adapter as a module, and the part they take in a forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ..errors import RegisterAdapterError
from .neuron_shift import NeuronShift

__all__ = ["ByAdapter", "Placement", "RegisterTokens", "Segment", "refuse_merging", "refuse_summing"]


class Placement(NamedTuple):
    """Where and how the registers of one adapter enter.

    Attributes:
        num_registers: Number R of registers in every block that has them.
        insert_layer: Index of the first block that has them.
        deep: Fresh registers at every block.
        key_value: Key/value pairs in every block's attention instead of tokens in the sequence.
        full_attentions: Attention maps are returned with the registers.
    """

    num_registers: int
    insert_layer: int = 0
    deep: bool = False
    key_value: bool = False
    full_attentions: bool = False

    def shape(self, hidden_size: int, num_blocks: int) -> tuple[int, ...]:
        """Shape of the weight: ``(R, D)``, ``(blocks, R, D)`` if deep, ``(blocks, 2, R, D)`` for key/value pairs."""
        last = (self.num_registers, hidden_size)
        if self.key_value:
            return (num_blocks - self.insert_layer, 2, *last)
        return (num_blocks - self.insert_layer, *last) if self.deep else last


class ByAdapter(nn.ModuleDict):
    """Modules by the name of their adapter, in a table that is replaced and never changed.

    A thread that walks over the model's modules, to read or to save it, sees the table as it was when it came by.
    """

    def __setitem__(self, key: str, module: nn.Module) -> None:
        fresh = nn.ModuleDict({key: module})  # which refuses what no table can hold
        self._modules = {**self._modules, **fresh._modules}

    def __delitem__(self, key: str) -> None:
        left = dict(self._modules)
        del left[key]
        self._modules = left


class RegisterTokens(NeuronShift):
    """The registers of one adapter, in a module that is called, so that offloading hooks bring them to the device.

    Args:
        weight: Initial values, see :meth:`Placement.shape`.
        pending: The values are to come from a file; until finite ones are here the registers take no part in the
            forward pass.
        gate: Initial bias on the attention logits of the registers' keys, ``(blocks, R)``; ``None`` for no gate.
    """

    def __init__(self, weight: torch.Tensor, pending: bool = False, gate: torch.Tensor | None = None) -> None:
        super().__init__()
        self.count = weight.shape[-2]  # the weight itself may be sharded or offloaded
        by_block = gate if gate is not None else weight if weight.ndim > 2 else None
        #: Number of blocks that have values of their own, ``None`` if all have the same.
        self.num_blocks = None if by_block is None else by_block.shape[0]
        self.weight = nn.Parameter(weight)
        self.gate = None if gate is None else nn.Parameter(gate)
        self.slices = {}
        self._pending = pending

    @property
    def pending(self) -> bool:
        """Whether the values from the file are still to come; the first finite ones settle it."""
        if self._pending:
            self._settle()
        return self._pending

    def _settle(self) -> None:
        parts = [*self.parameters(), *self.buffers()]
        self._pending = not all(_has_values(part) for part in parts)

    # Loaders put values in by load_state_dict or by assignment, and that is where they are looked at: a graph compiler
    # could not follow it in the first forward pass.

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._pending:
            self._settle()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, torch.Tensor) and self.__dict__.get("_pending"):
            self._settle()

    def forward(self, like: torch.Tensor, block: int | None = None, part: str = "weight") -> torch.Tensor:
        """The weight, or its part for one block, in the dtype and on the device of ``like``.

        With another ``part`` that instead: the ``"gate"`` ``(R,)`` of the block, zeros without a gate, or the neurons'
        ``"strength"`` ``(K,)``.
        """
        values: torch.Tensor | None = getattr(self, part)
        if values is None:
            return like.new_zeros(self.count)
        # A copy: ZeRO-3 takes a parameter's values away behind this module's forward, and FSDP allows no views of them.
        return (values if block is None else values[block]).to(like, copy=True)


def _has_values(part: torch.Tensor) -> bool:
    """Whether what waits for a file's values, NaN or an index of -1, has got them."""
    return not part.is_meta and bool((torch.isfinite(part) if part.is_floating_point() else part >= 0).all())


#: Parameters of :class:`RegisterTokens` that blocks draw from.
_PARTS = ("weight", "gate", "strength")


class _HandBack(torch.autograd.Function):
    """Hands a sequence on; in the backward pass, behind all blocks, parameters get what copies gathered."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, copies: list[torch.Tensor], *values: torch.Tensor) -> Any:
        ctx.copies = copies
        return hidden_states.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gathered = [copy.grad for copy in ctx.copies]
        for copy in ctx.copies:
            copy.grad = None
        return (grads[0], None, *gathered)


class Segment:
    """Consecutive registers in the sequence, or pairs in the attention: one adapter's, or image by image another's.

    Args:
        placement: Of the adapter; of several, the one with most registers.
        tokens: The adapters' registers, each once.
        images: For every image the position of its adapter in ``tokens``, or -1 for none; ``None``: all have the first.
    """

    def __init__(self, placement: Placement, tokens: list[RegisterTokens], images: list[int] | None = None) -> None:
        self.placement = placement
        self.tokens = tokens
        self.images = images
        self.count = placement.num_registers
        self._copies: dict[tuple[int, str], torch.Tensor] = {}
        self._task = _graph_task()
        self._with_gradients = torch.is_grad_enabled()

    @property
    def inside(self) -> bool:
        """Whether blocks draw from the parameters, not the sequence alone before the first of them."""
        placement = self.placement
        by_block = placement.deep or placement.key_value or placement.insert_layer > 0
        return by_block or any(tokens.gate is not None or tokens.slices for tokens in self.tokens)

    def gather(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Have blocks that are checkpointed reentrantly leave their gradients at copies of the parameters.

        Each of them has a backward pass of its own, and every one would end at the same parameter: DDP takes the first
        for the whole gradient.

        Args:
            hidden_states: ``(B, N, D)``, the sequence before registers enter.

        Returns:
            The sequence to go on with, behind whose gradient the parameters get theirs, once.
        """
        owned = [
            (number, part) for number, tokens in enumerate(self.tokens) for part in _PARTS if _trains(tokens, part)
        ]
        if not owned:
            return hidden_states
        values = [self.tokens[number](hidden_states, part=part) for number, part in owned]
        self._copies = {key: value.detach().requires_grad_() for key, value in zip(owned, values, strict=True)}
        return cast(torch.Tensor, _HandBack.apply(hidden_states, list(self._copies.values()), *values))

    def _drawn(self, number: int, like: torch.Tensor, block: int | None, part: str = "weight") -> torch.Tensor:
        """As a call of ``tokens[number]``, also in a block that is computed again."""
        tokens, copy = self.tokens[number], self._copies.get((number, part))
        if torch.compiler.is_compiling():
            return cast(torch.Tensor, tokens(like, block, part))
        if copy is not None and _graph_task() != self._task:
            return (copy if block is None else copy[block]).to(like)
        if copy is None and self._with_gradients and not torch.is_grad_enabled() and _trains(tokens, part):
            _refuse_unknown_checkpoint()
        return cast(torch.Tensor, tokens(like, block, part))

    @property
    def ragged(self) -> bool:
        """Whether some images have fewer registers than others, so that keys must be masked."""
        return self.images is not None and (
            -1 in self.images or min(tokens.count for tokens in self.tokens) < self.count
        )

    @property
    def biased(self) -> bool:
        """Whether the attention logits of the keys need a bias."""
        return self.ragged or any(tokens.gate is not None for tokens in self.tokens)

    def _by_image(self, values: list[torch.Tensor], batch: int, fill: float = 0.0) -> torch.Tensor:
        """``(..., R_i, D)`` each, as one ``(B, ..., R, D)``; images without an adapter get rows of ``fill``."""
        if self.images is None:
            return values[0].expand(batch, *values[0].shape)
        if len(self.images) != batch:
            raise ValueError(f"adapter_names has {len(self.images)} names for a batch of {batch} images")
        padded = [F.pad(v, (0, 0, 0, self.count - v.shape[-2]), value=fill) for v in values]
        padded.append(torch.full_like(padded[0], fill))  # index -1
        return torch.stack([padded[index] for index in self.images])

    def draw(self, hidden_states: torch.Tensor, block: int) -> torch.Tensor:
        """``(B, R, D)`` registers for block ``block``, like ``hidden_states`` ``(B, N, D)``."""
        index = block - self.placement.insert_layer if self.placement.deep else None
        return self._by_image(
            [self._drawn(number, hidden_states, index) for number in range(len(self.tokens))], hidden_states.shape[0]
        )

    def shift(
        self, activations: torch.Tensor, block: int, start: int, count: int, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Activations ``(B, N, M)`` of block ``block`` with the shift done; see :class:`NeuronShift`."""
        for number, tokens in enumerate(self.tokens):
            if block not in tokens.slices:
                continue
            strength = self._drawn(number, activations, None, "strength")
            if self.images is None:
                return tokens.shift(activations, block, start, count, visible, strength)
            own = min(count, tokens.count)
            chosen = torch.tensor([index == number for index in self.images], device=activations.device)
            shifted = tokens.shift(activations, block, start, own, visible, strength)
            activations = torch.where(chosen[:, None, None], shifted, activations)
        return activations

    def pairs(self, key: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(B, H, R, d)`` keys and values for block ``block``, like ``key`` ``(B, H, N, d)``."""
        index = block - self.placement.insert_layer
        batch, heads, _, width = key.shape
        both = self._by_image([self._drawn(number, key, index) for number in range(len(self.tokens))], batch)
        both = both.reshape(batch, 2, self.count, heads, width).transpose(2, 3)
        return both[:, 0], both[:, 1]

    def bias(self, like: torch.Tensor, block: int) -> torch.Tensor:
        """``(1 or B, R)`` to add to the attention logits of the keys: the gate, minus infinity where there is none."""
        index = block - self.placement.insert_layer
        gates = [self._drawn(number, like, index, "gate").unsqueeze(-1) for number in range(len(self.tokens))]
        batch = 1 if self.images is None else like.shape[0]
        return self._by_image(gates, batch, fill=-torch.inf).squeeze(-1)


def _trains(tokens: RegisterTokens, part: str) -> bool:
    value: torch.Tensor | None = getattr(tokens, part, None)
    return value is not None and value.requires_grad


def _graph_task() -> int:
    """Of the backward pass that this thread is in, -1 outside of any; one inside of another has a number of its own."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _refuse_unknown_checkpoint() -> None:
    """In a pass with gradients a block has none: code that we do not know checkpoints it reentrantly.

    Raises:
        RegisterAdapterError: DDP would take the gradient of one block for the whole.
    """
    ddp: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is not None and not ddp.static_graph:
        raise RegisterAdapterError(
            "a block with registers runs without gradients in a pass with gradients (is it checkpointed reentrantly, "
            "by code of yours?), and DistributedDataParallel would take one block's gradient for that of all. Use "
            "use_reentrant=False, the model's own gradient_checkpointing_enable(), or "
            "DistributedDataParallel(model, static_graph=True)."
        )


def refuse_merging() -> NoReturn:
    """Say why registers are not merged.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError(
        "registers are tokens, not weight deltas: they cannot be merged into the base's weights. Keep the adapter, "
        "take it off with unload(), or export the model with its registers with export_native()."
    )


def refuse_summing() -> NoReturn:
    """Say why there is no weighted sum of adapters.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError(
        "registers are tokens, not weight deltas: a weighted sum of two adapters does what neither of them does. Have "
        "both take part with model.base_model.set_adapter([...]), or train one that starts from the other."
    )
