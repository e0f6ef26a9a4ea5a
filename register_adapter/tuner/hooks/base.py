"""What the hooks of a register layer share: its tower, what takes part in a forward pass, and the state of one call."""

from __future__ import annotations

import operator
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...errors import UnsupportedModelError
from ..registers import RegisterTokens, Segment
from .call_state import CallState
from .recomputation import Inputs, carry, refuse_gone
from .tokens import cut_tokens

if TYPE_CHECKING:
    from ...towers.tower import Tower

__all__ = ["ATTACHING", "LayerHooks"]

#: Held by a thread that puts hooks and stand-ins in place.
ATTACHING = threading.RLock()


class LayerHooks:
    """The part of a :class:`RegisterLayer` that its hooks work with."""

    tower: Tower
    prefix: int
    call: CallState
    #: What blocks were given in passes with gradients, where the blocks are checkpointed with their hooks.
    inputs: Inputs
    #: Place of ``attention_mask`` among the tower's positional arguments.
    _mask_position: int | None
    #: Attention modules and the configs that stand-ins have replaced.
    _configs: list[tuple[Any, Any]]
    #: Those of the hooks that are in place.
    _handles: list[Any]
    #: What ``_all_points`` gave when the hooks were put there.
    _hooked: list[Any]
    #: Adapters that cannot work in the blocks that the tower has now, and why.
    misfits: dict[str, str]
    #: torch.fx has traced the tower, so that its layers may be parts of a graph.
    recorded: bool = False
    #: A pass of a tower that was traced is being compiled. Not in ``call``: dynamo follows no thread's attributes.
    compiled: bool = False

    @property
    @abstractmethod
    def segments(self) -> list[Segment]:
        """What takes part in the forward pass, in the order of entry."""

    @property
    @abstractmethod
    def _by_block(self) -> bool:
        """Whether an adapter does something at single blocks."""

    @property
    @abstractmethod
    def _in_attention(self) -> bool:
        """Whether an adapter has key/value pairs or a gate."""

    @property
    @abstractmethod
    def _neuron_blocks(self) -> set[int]:
        """Blocks with register neurons."""

    @abstractmethod
    def _misfit(self, name: str) -> str | None:
        """Why an adapter cannot work in the tower as it is; ``None`` if it can."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of the adapters."""

    @abstractmethod
    def tokens(self, adapter_name: str) -> RegisterTokens:
        """The registers of one adapter."""

    @abstractmethod
    def attach(self) -> None:
        """Register the hooks that the adapters need."""

    @abstractmethod
    def _all_points(self) -> list[Any]:
        """Modules that have hooks, or should have, in the tower as it is now."""

    @property
    @abstractmethod
    def _cuts_attentions(self) -> bool:
        """Whether registers are cut out of attention maps."""

    def _begin_pass(self, without: frozenset[str] = frozenset(), depth: int = 1) -> None:
        """Look up once what takes part in the pass that begins, so that it stays the same up to its end.

        Args:
            without: Names of more adapters that take no part in it.
            depth: Number of calls between this one and the one that lasts as long as the pass.

        Raises:
            UnsupportedModelError: An adapter that takes part cannot work in the blocks that the tower has now.
        """
        if torch.compiler.is_compiling():
            self._end_pass()
            self.compiled = self.recorded
        elif not self.call.begin():
            self.inputs.leave_all()
        if without:
            self.call.kept, self.call.asked = self.call.asked, self.call.asked | without
        # Not in a graph: part of it may be run by another pass, with other objects.
        if not torch.compiler.is_compiling():
            self._renew_hooks()
            segments = self.segments
            if self.misfits:
                self._refuse_misfits(segments)
            self.call.segments, self.call.frame = segments, sys._getframe(depth)
            self.call.trains = torch.is_grad_enabled()
            if self.call.trains:
                carry(self.tower.module, self, self._resume)
        elif segments := self.segments:
            self._check_graph(segments)

    def _resume(self) -> Callable[[], AbstractContextManager[None]]:
        resumed = self.call.resume()
        return partial(self._resumed, resumed) if self._is_needed_again else resumed

    def _resumed(self, resumed: Callable[[], AbstractContextManager[None]]) -> AbstractContextManager[None]:
        """What ``resumed`` makes, while there are hooks that do with it what the pass did."""
        return resumed() if self._handles else refuse_gone()

    @property
    def _is_needed_again(self) -> bool:
        """Whether hooks do something inside blocks, which are computed again where they are checkpointed."""
        anatomy = self.tower.anatomy
        inside = self._by_block or bool(self._neuron_blocks) or bool(self._configs)
        return inside or bool(anatomy.rotary or anatomy.position_bias or anatomy.positions_between)

    def _leave_behind(self) -> None:
        """The hooks are about to go: blocks that are still to be computed again would not notice."""
        if self._is_needed_again:
            self.inputs.refuse_in(self.tower.part("blocks"))

    def _refuse_misfits(self, segments: list[Segment]) -> None:
        present = [id(tokens) for segment in segments for tokens in segment.tokens]
        for name, sentence in self.misfits.items():
            if id(self.tokens(name)) in present:
                self._end_pass()
                raise UnsupportedModelError(
                    f"the adapter {name!r} cannot run: {sentence}. Was a block taken out, added or replaced after the "
                    "registers were added? Put the blocks back, or take the adapter off and add one that fits."
                )

    def _renew_hooks(self) -> None:
        """Put the hooks on the modules that are now where hooked ones were, if somebody has replaced any."""
        if self._is_hooked(self._all_points()):
            return
        with ATTACHING:
            points = self._all_points()
            if not self._is_hooked(points):  # by another thread meanwhile
                self.attach()

    def _drop_copies(self) -> None:
        """Take off the hooks that copies of hooked modules have: those of copies of this layer, which came along."""
        parts = list(self.tower.module.modules())
        known = {id(self), *map(id, parts)}
        for part in parts:
            for hooks in (part._forward_pre_hooks, part._forward_hooks):
                for key, hook in list(hooks.items()):
                    owner = getattr(getattr(hook, "func", hook), "__self__", None)
                    if isinstance(owner, LayerHooks) and id(owner) not in known:
                        del hooks[key]

    def _check_graph(self, segments: list[Segment]) -> None:
        """A graph may be of a model that has lost or got modules since its last pass: hooks do not move in it.

        Raises:
            UnsupportedModelError: Registers enter behind the last block, or a module that needs a hook has none.
        """
        name, count = type(self.tower.module).__name__, len(self.tower.part("blocks"))
        if any(segment.placement.insert_layer >= count for segment in segments):
            raise UnsupportedModelError(
                f"{name} has {count} blocks now, and registers enter behind the last one. Put the blocks back, or take "
                "the adapter off and add one that fits."
            )
        if not self._is_hooked([_unwrapped(point) for point in self._all_points()], unwrapped=True):
            raise UnsupportedModelError(
                f"modules of {name} were replaced or wrapped after the registers were added, and their hooks do not "
                "move inside of a compiled model. Call the model once uncompiled, under torch.no_grad() if you like, "
                "and compile it then."
            )

    def _is_hooked(self, points: list[Any], unwrapped: bool = False) -> bool:
        hooked = [_unwrapped(point) for point in self._hooked] if unwrapped else self._hooked
        return len(points) == len(hooked) and all(map(operator.is_, points, hooked))

    def _end_pass(self) -> None:
        if not torch.compiler.is_compiling():
            self.call.end()
            return
        self.call.segments = self.call.frame = self.call.visible = self.call.rotary = None
        self.call.entered, self.call.length, self.call.left = 0, 0, False
        if self.recorded:
            self.compiled = False
        if self.call.kept is not None:
            self.call.asked, self.call.kept = self.call.kept, None

    def _end_if_over(self) -> None:
        """A part is called: maybe alone, after a pass that Ctrl-C has ended, of which it then knows nothing."""
        if not torch.compiler.is_compiling() and self.call.is_over:
            self.inputs.leave_all()
            self.call.outer = ()
            self._end_pass()

    def _check_left(self, counts: list[int]) -> None:
        """Registers went in, and have come out again.

        Args:
            counts: Numbers of registers that should be in the sequence on its way.

        Raises:
            UnsupportedModelError: A module with a hook that puts them in or takes them out was not called.
        """
        # A graph need not tell others what entered in it.
        if counts and self.call.entered not in (0, counts[-1]):
            self._refuse_skipped(counts[-1])
        if self.call.entered and not self.call.left:
            anatomy = self.tower.anatomy
            raise UnsupportedModelError(
                f"registers entered {type(self.tower.module).__name__} at {anatomy.embeddings!r} and did not leave it "
                f"at {anatomy.remove!r}, which this forward pass did not call. Was that module replaced after the "
                "registers were added, and the model compiled or called in parts since? Call the whole model once."
            )

    def _leave(self, count: int, length: int) -> bool:
        """Whether the ``count`` registers that should be in a sequence are, now that it comes to where they leave.

        Args:
            count: Their number.
            length: That of the tokens in the sequence.

        Raises:
            UnsupportedModelError: There is another number of them: what would be cut out are patches.
        """
        alone, compiling = self.call.segments is None, torch.compiler.is_compiling()
        known = 0 if compiling else self.call.length
        if self.call.entered != count and not compiling:
            if alone and not self.call.entered:  # a module that somebody calls with a sequence of their own
                return False
            # Compiled parts do not tell what entered in them; how long the sequence is tells it too.
            self._refuse_skipped(count, None if not known or length == known + count else length - known)
        elif known:
            if alone and length == known:  # the same, after the embeddings were called alone
                return False
            if (missing := known + count - length) in self._counts:
                self._refuse_without(missing, length)
        self.call.left = True
        if alone and not compiling:
            self.call.entered = self.call.length = 0
        return True

    def _check_entered(self, block: int) -> None:
        """The registers that should be in the sequence before block ``block`` are, in a pass of the whole tower.

        Raises:
            UnsupportedModelError: As for :meth:`_leave`.
        """
        if self.call.segments is None or torch.compiler.is_compiling():
            return
        count = self.count_at(max(block - 1, 0))
        if self.call.entered != count:
            self._refuse_skipped(count)

    def _refuse_skipped(self, count: int, counted: int | None = None) -> None:
        # A graph does not tell others what entered in it.
        compiled = torch.compiler.is_compiling() or any(map(_is_compiled, self.tower.module.modules()))
        if compiled and counted is None:
            return
        entered, name = self.call.entered if counted is None else counted, type(self.tower.module).__name__
        late = {segment.placement.insert_layer for segment in self.sequence}
        places = [f"block {layer}" if layer else repr(self.tower.anatomy.embeddings) for layer in sorted(late)]
        self._end_pass()
        raise UnsupportedModelError(
            f"{count} registers should be in the sequence of {name} by now, and {entered} are: they enter at "
            f"{' and '.join(places)}, which this forward pass did not call exactly once. Does code of yours skip or "
            "repeat blocks? Call all of them in order, or run it without registers: with model.disable_adapter()."
        )

    def _refuse_without(self, missing: int, length: int) -> None:
        name = type(self.tower.module).__name__
        self._end_pass()
        raise UnsupportedModelError(
            f"{missing} registers entered {name}, and behind its blocks the sequence of {length} tokens is without "
            "them. Did a hook or a block of yours return a sequence of a pass without registers? Have it return one of "
            "a pass with them, or run both without: with model.disable_adapter()."
        )

    @property
    def sequence(self) -> list[Segment]:
        """The segments that are tokens in the sequence, in their order there."""
        return [segment for segment in self.segments if not segment.placement.key_value]

    def count_at(self, block: int) -> int:
        """Number of registers in the sequence inside block ``block``; 0 stands for the embeddings' output too."""
        return _count_at(self.sequence, block)

    @property
    def num_active(self) -> int:
        """Number of registers in the sequence when it leaves the last block."""
        counts = self._counts
        return counts[-1] if counts else 0

    @property
    def _counts(self) -> list[int]:
        """Numbers of registers in the sequence on its way, ascending, the last one behind the last block."""
        sequence = self.sequence
        if len(sequence) < 2:
            return [segment.count for segment in sequence]
        return sorted({_count_at(sequence, segment.placement.insert_layer) for segment in sequence})

    def _cut(self, value: Any, length: int, counts: list[int]) -> Any:
        """Take the registers out of everything; ``length`` is that of a sequence without them.

        What was recorded on the way has the registers of the block it comes from: one of ``counts``.
        """
        for count in counts:
            value = cut_tokens(value, self.prefix, count, length + count, self._cuts_attentions)
        return value


def _unwrapped(module: Any) -> Any:
    """A module without what compiles or checkpoints it, and calls its hooks."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        module = getattr(module, name, module)
    return module


def _is_compiled(module: Any) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def _count_at(sequence: list[Segment], block: int) -> int:
    return sum(segment.count for segment in sequence if segment.placement.insert_layer <= block)
