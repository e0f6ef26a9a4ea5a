"""The hooks that put registers into the sequence and take them out again, as methods of the tuner layer.

Bound methods, not closures: a deep copy of a model must have hooks of its own.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import nn

from ...towers.calls import first_of, hidden_states_of, place_of_argument, with_first, with_hidden_states
from .collected import cut_collected
from .masks import grow_masks
from .recomputation import checkpoints_reentrantly
from .recording import RecordingHooks, is_recorded
from .tokens import cut_tokens, grow_bias, grow_mask, grow_rotary, insert_tokens, pad_tokens

__all__ = ["SequenceHooks"]


class SequenceHooks(RecordingHooks):
    """What a :class:`RegisterLayer` does to the sequence; mixed into it."""

    def _sequence_hooks(self) -> list[Any]:
        """Register the hooks; those on blocks only where an adapter or the family needs them."""
        module, anatomy = self.tower.module, self.tower.anatomy
        embeddings: nn.Module = self.tower.part("embeddings")
        remove: nn.Module = self.tower.part("remove")
        handles: list[Any] = [
            module.register_forward_pre_hook(self._tower_input_hook, with_kwargs=True),
            embeddings.register_forward_pre_hook(self._insert_into_input_hook, with_kwargs=True)
            if anatomy.insert_at == "input"
            else embeddings.register_forward_hook(self._insert_into_output_hook),
            remove.register_forward_pre_hook(self._remove_from_input_hook)
            if anatomy.remove_from == "input"
            else remove.register_forward_hook(self._remove_from_output_hook),
        ]
        if remove is not module:  # a tower that ends where registers leave needs no second cut
            handles.append(module.register_forward_hook(self._tower_output_hook))
        first = next(iter(self.tower.part("blocks")))
        handles.append(first.register_forward_pre_hook(self._first_block_hook, with_kwargs=True))
        handles += self._again_hooks()
        biases = {bias: block for block, bias in self.tower.parts("position_bias")}  # once, if blocks share them
        for bias, block in biases.items():
            handles.append(bias.register_forward_pre_hook(partial(self._position_length_hook, block), with_kwargs=True))
            handles.append(bias.register_forward_hook(partial(self._position_bias_hook, block)))
        if biases:
            for block in self.tower.part("blocks"):
                handles.append(block.register_forward_pre_hook(self._additive_mask_hook, with_kwargs=True))
        handles += [
            module.register_forward_hook(self._positions_between_hook)
            for module in dict.fromkeys(module for _, module in self.tower.parts("positions_between"))
        ]
        if anatomy.rotary:
            places = {block: index for index, block in enumerate(self.tower.part("blocks"))}
            for block, index in places.items():
                hook = partial(self._rotary_hook, index, place_of_argument(block, anatomy.rotary))
                handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        if self._by_block:
            for index, block in enumerate(self.tower.part("blocks")):
                hook = partial(self._block_hook, index)
                handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
                if anatomy.method_counter:
                    handles.append(block.register_forward_hook(partial(self._fill_up_hook, index)))
        handles.append(module.register_forward_hook(self._end_pass_hook, always_call=True))
        return handles

    def _again_hooks(self) -> list[Any]:
        """First of all at a block: is it computed again? Where blocks are checkpointed with their hooks."""
        handles: list[Any] = []
        for block in self.tower.part("blocks") if self._is_called_again else ():
            handles.append(block.register_forward_pre_hook(self._again_hook, with_kwargs=True))
            handles.append(block.register_forward_hook(self._again_end_hook, always_call=True))
        return handles

    @property
    def _is_called_again(self) -> bool:
        """Whether blocks that need to know their pass are checkpointed by a function that cannot tell it them."""
        needed = self._by_block or bool(self.tower.anatomy.rotary) or bool(self._neuron_blocks)
        return needed and not all(hasattr(block, "gradient_checkpointing") for block in self.tower.part("blocks"))

    def _again_hook(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or is_recorded(hidden_states_of(args, kwargs)):
            return
        self._end_if_over()
        if self.call.segments is None:
            self.inputs.enter(hidden_states_of(args, kwargs))
        elif self.call.trains:
            self.inputs.note(hidden_states_of(args, kwargs), self.call.resume())

    def _again_end_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.inputs.leave()

    def _hook_points(self) -> list[Any]:
        """Where hooks are, or should be, in the tower as it is now."""
        tower, anatomy = self.tower, self.tower.anatomy
        points = [tower.part("embeddings"), tower.part("remove")]
        if anatomy.position_bias:
            points += [module for _, module in tower.parts("position_bias")]
        if anatomy.positions_between:
            points += [module for _, module in tower.parts("positions_between")]
        every = self._by_block or anatomy.rotary or anatomy.position_bias or self._is_called_again
        return [*points, *(tower.part("blocks") if every else islice(tower.part("blocks"), 1))]

    def _tower_input_hook(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        # One hook for both: the pass may begin with new hooks, and torch would go on with those that it has listed.
        # A replica of DataParallel runs in a thread of its own, and does what the one that made it asks.
        if is_recorded(*args, *kwargs.values()):
            return None
        replica: Any = module if getattr(module, "_is_replica", False) else None
        self._begin_pass(replica.registers.asked if replica is not None else frozenset(), depth=2)
        # Elsewhere the mask grows where registers join.
        return self._grow_mask(args, kwargs) if self.tower.anatomy.insert_at == "output" else None

    def _end_pass_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._counts and not is_recorded(*args, output):
            cut_collected(self.tower.part("blocks"), self._without_registers)
        self._end_pass()

    def _without_registers(self, block: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """What block ``block`` returned ``(B, N, D)``, without registers; of another pass, as it is."""
        length, count = hidden_states.shape[1], self.count_at(block)
        if self.call.length and length != self.call.length + count:
            return hidden_states
        return cast(torch.Tensor, cut_tokens(hidden_states, self.prefix, count, length))

    def _insert(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        if self._leaves_to_graph(hidden_states):
            return None
        self._end_if_over()
        if self.call.method is not None:
            self.call.method.enter(hidden_states.shape[1], self.num_active)
        given = hidden_states
        inside = [] if torch.compiler.is_compiling() else [s for s in self.call.segments or () if s.inside]
        for segment in inside if inside and self._is_reentrant else ():
            hidden_states = segment.gather(hidden_states)
        tokens = [s.draw(hidden_states, 0) for s in self.sequence if s.placement.insert_layer == 0]
        self.call.entered = self.count_at(0)
        if not torch.compiler.is_compiling():
            self.call.length = hidden_states.shape[1]
        if tokens:
            hidden_states = insert_tokens(hidden_states, tokens, self.prefix)
        if self._loses_gradients(hidden_states):
            return hidden_states.detach().requires_grad_()
        return None if hidden_states is given else hidden_states

    def _loses_gradients(self, hidden_states: torch.Tensor) -> bool:
        """Whether registers that enter inside a block would get no gradient.

        Reentrant checkpointing of a block gives none to anything unless the block's input has one.
        """
        if hidden_states.requires_grad or not self._is_reentrant:
            return False
        return any(p.requires_grad for s in self.segments for tokens in s.tokens for p in tokens.parameters())

    @property
    def _is_reentrant(self) -> bool:
        """Whether blocks are checkpointed reentrantly in a pass with gradients."""
        training = self.tower.module.training and torch.is_grad_enabled()
        return training and any(checkpoints_reentrantly(module) for module in self.tower.module.modules())

    def _insert_into_output_hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, dict):  # a ModelOutput, changed in place
            name = next(key for key, value in output.items() if value is not None)
            grown = self._insert(output[name])
            if grown is not None:
                output[name] = grown
            return output
        grown = self._insert(first_of(output))
        if grown is None:
            return None
        return with_first(output, grown)

    def _insert_into_input_hook(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        grown = self._insert(hidden_states_of(args, kwargs))
        if grown is None:
            return None
        count = self.count_at(0)
        args, kwargs = grow_masks(args, kwargs, self.prefix, count, grown.shape[1])
        return with_hidden_states(args, kwargs, grown)

    def _block_hook(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Registers that start at this block, fresh ones of deep adapters, and masks made for another length."""
        hidden = given = hidden_states_of(args, kwargs)
        if is_recorded(hidden):
            return None
        self._end_if_over()
        segments = [s for s in self.sequence if s.placement.insert_layer <= index]
        count = sum(segment.count for segment in segments)
        self._check_entered(index)
        if index == 0 and not torch.compiler.is_compiling():  # the embeddings may be compiled
            self.call.length = hidden.shape[1] - count
        if index > 0:
            hidden = self.without_placeholders(hidden, index - 1)
        start = self.prefix
        for segment in segments:
            first = segment.placement.insert_layer
            if first == index and index > 0:
                self.call.entered += segment.count
                hidden = insert_tokens(hidden, [segment.draw(hidden, index)], start)
            elif segment.placement.deep and first < index:
                fresh = segment.draw(hidden, index)
                hidden = torch.cat([hidden[:, :start], fresh, hidden[:, start + segment.count :]], dim=1)
            start += segment.count
        before = self.count_at(0)
        if hidden is given and count == before:
            return None
        if count > before:  # in every block from there on: each is given the mask that was made before the first
            args, kwargs = grow_masks(args, kwargs, self.prefix + before, count - before, hidden.shape[1])
        return with_hidden_states(args, kwargs, hidden)

    def _rotary_hook(self, index: int, place: int | None, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Rotary tables with a row for every token: registers have no position, and stay as they are."""
        count, name = self.count_at(index), cast(str, self.tower.anatomy.rotary)
        place = len(args) if place is None else place
        tables = kwargs.get(name, args[place] if place < len(args) else None)
        if not count or tables is None:
            return None
        grown = self._grown_rotary(tables, count)
        if name in kwargs:
            return args, {**kwargs, name: grown}
        return (*args[:place], grown, *args[place + 1 :]), kwargs

    def _grown_rotary(self, tables: Any, count: int) -> Any:
        """The tables with rows for registers; blocks that share tables share these too."""
        if torch.compiler.is_compiling():
            return grow_rotary(tables, self.prefix, count)
        known = self.call.rotary
        if known is None or known[0] is not tables or known[1] != count:
            self.call.rotary = known = (tables, count, grow_rotary(tables, self.prefix, count))
        return known[2]

    def _fill_up_hook(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        """Inside a method every block returns the same number of tokens: zeros for registers that start later."""
        missing = self.num_active - self.count_at(index) if self.call.method is not None else 0
        if not missing:
            return None
        hidden = first_of(output)
        filled = pad_tokens(hidden, self.prefix + self.count_at(index), missing)
        return with_first(output, filled)

    def without_placeholders(self, hidden_states: torch.Tensor, block: int) -> torch.Tensor:
        """What block ``block`` returned ``(B, N, D)``, without what stands there for registers that start later."""
        present = self.count_at(block)
        missing = self.num_active - present if self.call.method is not None else 0
        if not missing:
            return hidden_states
        return cast(torch.Tensor, cut_tokens(hidden_states, self.prefix + present, missing, hidden_states.shape[1]))

    def _remove_from_input_hook(self, module: nn.Module, args: Any) -> Any:
        if self._leaves_to_graph(args[0]):
            return None
        self._end_if_over()
        counts = [] if self.call.method is not None else self._counts
        if not counts or not self._leave(counts[-1], args[0].shape[1]):
            return None
        return self._cut(args, args[0].shape[1] - counts[-1], counts)

    def _remove_from_output_hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._end_if_over()
        counts = [] if self.call.method is not None else self._counts
        if not counts:
            return None
        hidden = output if isinstance(output, torch.Tensor) or is_recorded(output) else _entries(output)[0]
        if self._leaves_to_graph(hidden):
            return None
        if not self._leave(counts[-1], hidden.shape[1]):
            return None
        return self._cut(output, hidden.shape[1] - counts[-1], counts)

    def _tower_output_hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        counts = self._counts
        # In a graph, a method that the tower's forward calls has ended the pass.
        if not (torch.compiler.is_compiling() and self.tower.anatomy.pass_methods):
            self._check_left(counts)
        if not counts:
            return None
        entries = [] if isinstance(output, torch.Tensor) or is_recorded(output) else _entries(output)
        if is_recorded(output, *entries[:1]):
            return None
        # No ``next(..., None)``: the graph compiler of older torch does not know it.
        last = entries[0] if entries else None
        if isinstance(last, (tuple, list)) and last:  # a backbone's feature maps, (B, D, h, w) or (B, N, D)
            last = last[-1]
            length = last.shape[1] if last.ndim == 3 else last.shape[-2:].numel() + self.prefix
        elif isinstance(last, torch.Tensor) and last.ndim == 3:
            length = last.shape[1]
        else:
            return None
        return self._cut(output, length, counts)

    def _position_length_hook(self, index: int | None, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A bias that is interpolated to the length of the sequence must not count registers (BEiT's ``dim_size``)."""
        count = self.count_at(index or 0)
        if not count or kwargs.get("dim_size") is None:
            return None
        return args, {**kwargs, "dim_size": kwargs["dim_size"] - count}

    def _positions_between_hook(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Position embeddings ``(..., N, D)`` that are added between blocks: registers have none there either."""
        count = self.count_at(0)
        if not count:
            return None
        zeros = output.new_zeros(*output.shape[:-2], count, output.shape[-1])
        return torch.cat([output[..., : self.prefix, :], zeros, output[..., self.prefix :, :]], dim=-2)

    def _additive_mask_hook(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Make a boolean mask additive in a model with a position bias.

        transformers adds the two, which puts every token that is seen at 1 and key/value pairs behind them at 0.
        """
        dtype = hidden_states_of(args, kwargs).dtype

        def additive(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.ndim != 4:
                return value
            return torch.zeros_like(value, dtype=dtype).masked_fill(~value, torch.finfo(dtype).min)

        if not self.segments:
            return None
        return tuple(additive(value) for value in args), {name: additive(value) for name, value in kwargs.items()}

    def _position_bias_hook(self, index: int | None, module: nn.Module, args: Any, output: Any) -> Any:
        count = self.count_at(index or 0)
        return grow_bias(output, self.prefix, count) if count else None

    def _grow_mask(self, args: Any, kwargs: Any) -> Any:
        position = self._mask_position
        positional = args[position] if position is not None and len(args) > position else None
        mask = kwargs.get("attention_mask", positional)
        count = self.count_at(0) if mask is not None else 0
        if not count:
            return None
        grown = grow_mask(mask, self.prefix, count)
        if position is None or "attention_mask" in kwargs:
            return args, {**kwargs, "attention_mask": grown}
        return (*args[:position], grown, *args[position + 1 :]), kwargs


def _entries(output: Any) -> list[Any]:
    """What a tuple, a ``ModelOutput`` or a plain dictionary, as DINOv2's own code returns it, has in it."""
    return list(output.values() if isinstance(output, dict) else output)
