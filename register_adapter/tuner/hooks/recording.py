"""Passes that torch.fx records: registers become a part of the graph, inside of each block alone.

While it records, torch.fx calls a model with proxies for tensors, hooks included; but torch's own layers, and their
hooks, it leaves for the time when the graph runs. So what is recorded does not rest on hooks at single layers: every
block gets the registers with what it is given, and its output, which a user may ask for, is without them. What torch's
compiler makes does rest on hooks, of which it has to be told.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy, interpreter

from ...errors import UnsupportedModelError
from ...towers.calls import first_of, hidden_states_of, with_first, with_hidden_states
from ..registers import Segment
from .base import LayerHooks
from .tokens import insert_tokens

__all__ = ["RecordingHooks", "is_recorded", "show_hooks_to_compiler"]

_INSTEAD = (
    "Trace the base without registers or export_native(model), use capture(model) for features, or torch.export for a "
    "graph."
)
_SINGLE = "torch.fx has recorded its blocks as single steps"


def show_hooks_to_compiler() -> None:
    """Have the graphs that this thread compiles look whether a module has hooks, and drop those made before the first.

    By default torch runs the graph of a module without hooks for others of its class that have some, in silence
    (``torch._dynamo.config.skip_nnmodule_hook_guards``, which torch's source calls unsafe).
    """
    config: Any = torch._dynamo.config
    if not torch.compiler.is_compiling() and config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        _drop_graphs()


@cache  # once: other threads may be at work with theirs
def _drop_graphs() -> None:
    torch.compiler.reset()


def is_recorded(*values: Any) -> bool:
    """Whether torch.fx is tracing the pass that these values are arguments, or outputs, of."""
    return any(isinstance(value, Proxy) for value in values)


def _is_argument(value: Any) -> bool:
    return isinstance(value, Proxy) and value.node.op == "placeholder"


def _is_graph(name: str) -> bool:
    return name.startswith("<eval_with_key>") or name == interpreter.__file__


def _is_below_graph() -> bool:
    """Whether a graph of torch.fx has called what is running, or a module around it."""
    frame: Any = sys._getframe(1)
    while frame is not None and not _is_graph(frame.f_code.co_filename):
        frame = frame.f_back
    return frame is not None


def _is_in_graph() -> bool:
    """Whether the module whose hook is running was called by a graph of torch.fx."""
    calls = nn.modules.module.__file__
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename != calls:
        frame = frame.f_back
    while frame.f_back is not None and frame.f_code.co_filename == calls:
        frame = frame.f_back
    return _is_graph(frame.f_code.co_filename)


class _Carried:
    """Registers behind a block: proxies, which no copy of a model takes along if its trace was broken off."""

    def __init__(self, tokens: Any = None) -> None:
        self.tokens = tokens

    def __reduce__(self) -> tuple[type[_Carried], tuple[()]]:
        return _Carried, ()


class RecordingHooks(LayerHooks):
    """What a :class:`RegisterLayer` does while torch.fx is tracing, and in the graph; mixed into it."""

    #: The hooks of the trace that is being made.
    _recording: tuple[Any, ...] = ()
    #: ``(B, R, D)``, the registers behind the block that was traced last.
    _carried: _Carried = _Carried()

    def _leaves_to_graph(self, value: Any) -> bool:
        """Whether a hook outside of the blocks has nothing to do, as a graph does it, or a trace for a graph.

        Args:
            value: The sequence ``(B, N, D)`` that the hook is given, or a proxy for one.

        Raises:
            UnsupportedModelError: A graph is compiled.
        """
        if is_recorded(value):
            return True
        if not torch.compiler.is_compiling():
            return self.call.segments is None and _is_in_graph()
        if self.recorded and not self.compiled and self.segments:
            raise UnsupportedModelError(
                "torch.compile is given a graph that torch.fx made of a model with registers, in which it cannot tell "
                f"the hooks of {type(self.tower.module).__name__} from those of a model. Compile the model itself."
            )
        return False

    def _first_block_hook(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden: Any = hidden_states_of(args, kwargs)
        if is_recorded(hidden):
            return self._record(hidden.tracer, args, kwargs)
        if torch.compiler.is_compiling() or self.call.segments is not None or not self.segments:
            return None
        # Where the registers came in, a step is more than blocks.
        if _is_in_graph() or (not self.call.length and _is_below_graph()):
            self._refuse_to_record(_SINGLE)
        return None

    def _record(self, tracer: Any, args: Any, kwargs: Any) -> Any:
        """Have the blocks record what registers do in them; the arguments of the first one, with registers."""
        self._end_recording()
        segments = self.segments
        if not segments:
            return None
        self._check_recordable(segments, tracer.root, args, kwargs)
        blocks = list(self.tower.part("blocks"))
        if any(tracer.is_leaf_module(block, tracer.path_of_module(block)) for block in blocks):
            self._refuse_to_record(_SINGLE)
        self._recording = tuple(
            handle
            for index, block in enumerate(blocks)
            for handle in (
                block.register_forward_pre_hook(partial(self._recorded_input_hook, index), with_kwargs=True),
                block.register_forward_hook(partial(self._recorded_output_hook, index, index == len(blocks) - 1)),
            )
        )
        self.recorded = True
        return self._recorded_input(0, args, kwargs)

    def _check_recordable(self, segments: list[Segment], root: nn.Module, args: Any, kwargs: Any) -> None:
        anatomy = self.tower.anatomy
        hidden = hidden_states_of(args, kwargs)
        # An argument of the whole model's is None as a rule, and of a wrong length for torch's attention otherwise.
        others = [value for value in (*args, *kwargs.values()) if value is not hidden and not _is_argument(value)]
        if self._in_attention or self._neuron_blocks:
            self._refuse_to_record("its registers do more than join the sequence (key_value, gate, register_neurons)")
        if anatomy.rotary or anatomy.position_bias or anatomy.positions_between or is_recorded(*others):
            self._refuse_to_record("its blocks are given masks, or positions for every token")
        if any(segment.images is not None for segment in segments):
            self._refuse_to_record("every image has an adapter of its own (adapter_names)")
        if id(self) not in map(id, root.modules()):
            self._refuse_to_record(f"{type(root).__name__}, which it was given, is a part without the registers")
        embeddings: Any = self.tower.part("embeddings")
        if anatomy.insert_at == "input" and any(True for _ in embeddings.children()):
            self._refuse_to_record(f"they enter before {anatomy.embeddings!r}, which is more than a single layer")

    def _refuse_to_record(self, reason: str) -> None:
        raise UnsupportedModelError(
            "torch.fx is tracing a model with register hooks (torchvision's create_feature_extractor? timm's "
            f"features_cls='fx'?), and what it records would leave the registers out, or in: {reason}. {_INSTEAD}"
        )

    def _recorded_input_hook(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._recorded_input(index, args, kwargs) if index else None  # the first block's are in already

    def _recorded_input(self, index: int, args: Any, kwargs: Any) -> Any:
        hidden: Any = hidden_states_of(args, kwargs)
        if not is_recorded(hidden):
            return None
        tokens: list[Any] = []
        start = 0  # of a segment among the registers that come from the block before
        for segment in self.sequence:
            first, deep = segment.placement.insert_layer, segment.placement.deep
            if first == index or (deep and first < index):
                # A proxy has no length for ``draw`` to go by.
                drawn = segment.tokens[0](hidden, index - first if deep else None)
                drawn = drawn.unsqueeze(0).expand(hidden.shape[0], -1, -1)
                # A pass puts them in before this layer, a norm, which works on every token alone.
                normed = index == 0 and self.tower.anatomy.insert_at == "input"
                tokens.append(self.tower.part("embeddings")(drawn) if normed else drawn)
            elif first < index:
                tokens.append(self._carried.tokens[:, start : start + segment.count])
            start += segment.count
        return with_hidden_states(args, kwargs, insert_tokens(hidden, tokens, self.prefix)) if tokens else None

    def _recorded_output_hook(self, index: int, last: bool, module: nn.Module, args: Any, output: Any) -> Any:
        hidden, start = first_of(output), self.prefix
        end = start + self.count_at(index)
        if last:
            self._end_recording()
        if not is_recorded(hidden) or end == start:
            return None
        self._carried = _Carried(None if last else hidden[:, start:end])
        return with_first(output, torch.cat([hidden[:, :start], hidden[:, end:]], dim=1))

    def _end_recording(self) -> None:
        for handle in self._recording:
            handle.remove()
        self._recording, self._carried = (), _Carried()
