"""Which adapters take part in a pass: the active ones, fewer of them in one thread, or image by image another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ...errors import RegisterAdapterError
from ..fields import check_string
from ..heads import HeadLabels
from ..registers import Placement, RegisterTokens, Segment
from .attention import AttentionHooks, reads_implementation
from .base import ATTACHING
from .fitting import names_for_head

__all__ = ["BASE", "EVERYONE", "Choice", "check_batch"]

#: Among ``adapter_names``, PEFT's name for an image without an adapter.
BASE = "__base__"
#: Among names that are left out, all adapters, those that come meanwhile too; no adapter can have it for a name.
EVERYONE = ""


def check_batch(names: Sequence[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> None:
    """Whether ``adapter_names=`` has a name for each image of a batch.

    Args:
        names: What was given.
        args: The other arguments of the pass.
        kwargs: Those by keyword.
        training: Whether the model is in training mode.

    Raises:
        ValueError: It is in training mode, or the names are not as many as the images.
        TypeError: A name is not a string.
    """
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call model.eval() first")
    for name in names:
        check_string(name)
    images = kwargs.get("pixel_values", next(iter(args), None))
    batch = len(images) if isinstance(images, torch.Tensor) and images.ndim in (3, 4) else len(names)
    if len(names) != batch:
        raise ValueError(f"adapter_names has {len(names)} names for a batch of {batch} images; give one per image")


class Choice(AttentionHooks):
    """What a :class:`RegisterLayer` has take part; mixed into it."""

    register_adapter_tokens: nn.ModuleDict
    placements: dict[str, Placement]
    training: bool
    labels: HeadLabels
    _active_adapter: str | list[str]
    _disable_adapters: bool
    #: Number of contexts, of any threads, in which no registers take part.
    _aside: int

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of the adapters."""

    @abstractmethod
    def show_labels(self) -> None:
        """Have the model's config name the classes of the active adapter's head."""

    @staticmethod
    @abstractmethod
    def _refuse(adapter_name: str) -> None:
        """Say that an adapter has got no values."""

    @property
    def active_names(self) -> list[str]:
        """Names of the active adapters, whether or not they are disabled."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else active

    def tokens(self, adapter_name: str) -> RegisterTokens:
        """The registers of one adapter.

        Raises:
            KeyError: There is no adapter of that name.
        """
        return cast(RegisterTokens, self.register_adapter_tokens[adapter_name])

    @property
    def _here(self) -> list[tuple[Placement, RegisterTokens]]:
        """Placement and registers of every adapter that is there whole: another thread may add one, or delete one."""
        modules: Any = self.register_adapter_tokens._modules
        return [(place, modules[name]) for name, place in list(self.placements.items()) if name in list(modules)]

    @property
    def _in_attention(self) -> bool:
        return any(placement.key_value or tokens.gate is not None for placement, tokens in self._here)

    @property
    def _by_block(self) -> bool:
        return any(placement.deep or placement.insert_layer for placement, _ in self._here)

    @property
    def _neuron_blocks(self) -> set[int]:
        return {block for _, tokens in self._here for block in tokens.slices}

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the context no registers take part; heads trained beside them, and gradients, stay as they are."""
        with ATTACHING:
            self._aside += 1
        try:
            yield
        finally:
            with ATTACHING:
                self._aside -= 1

    @property
    def segments(self) -> list[Segment]:
        """What takes part in the forward pass, in the order of entry; nothing while adapters are disabled.

        Raises:
            AdapterFileError: In training mode, an adapter still waits for its values.
        """
        # Every hook asks, between two operations on tensors: what is looked up here is all that a short pass notices.
        call = self.call
        if call.segments is not None and not torch.compiler.is_compiling():
            return call.segments
        without = call.without
        staying = call.staying
        if EVERYONE in without or (staying is None and (self._disable_adapters or self._aside)):
            return []
        if call.images is not None:
            return self._segments_by_image([BASE if name in without else name for name in call.images])
        segments = []
        active = self._active_adapter if staying is None else staying
        for name in (active,) if isinstance(active, str) else dict.fromkeys(active):
            if name not in self.placements or name in without:
                continue
            tokens = cast(RegisterTokens, self.register_adapter_tokens[name])
            if not tokens.pending:
                segments.append(Segment(self.placements[name], [tokens]))
            elif self.training:
                self._refuse(name)
        if len(segments) > 1:  # those that start later come later in the sequence too: nobody's place changes then
            segments.sort(key=lambda segment: segment.placement.insert_layer)
        return segments

    @contextmanager
    def staying(self, names: Iterable[str] | None = None) -> Iterator[None]:
        """This thread's passes in the context have the adapters of its start, whichever another thread sets meanwhile.

        So what is read of a pass behind its end, such as a number of registers, is that pass's.

        Args:
            names: Adapters that it has in place of the active ones.

        Raises:
            RegisterAdapterError: An adapter was deleted meanwhile.
        """
        call = self.call
        off = self._is_off if call.start is None else call.off
        kept = call.start if call.staying is None else call.staying
        if names is not None:
            kept = () if off else tuple(dict.fromkeys(names))
        elif kept is None:
            kept = self._at_start()
        with call.reading(staying=kept, read=self._to_read(kept)):
            self._check_there()
            yield
            self._check_there()

    @contextmanager
    def starting(self) -> Iterator[None]:
        """In the context, :meth:`staying` takes the adapters of its start; passes outside of that are as ever.

        A data set may run the model itself while it is read, with adapters of its own.
        """
        call = self.call
        if call.start is not None:
            yield
            return
        start = self._at_start() if call.staying is None else call.staying
        with call.reading(start=start, off=self._is_off, read=self._to_read(start)):
            yield

    def _to_read(self, names: Iterable[str]) -> dict[str, RegisterTokens]:
        """Registers by the names of their adapters, those that a reading keeps already as it found them."""
        there: Any = {**self.register_adapter_tokens._modules, **self.call.read}
        return {name: there[name] for name in names if name in there}

    def _check_there(self) -> None:
        """The adapters that a reading keeps are those that it began with.

        Raises:
            RegisterAdapterError: One was deleted; the rest of the images would be read without it, in silence.
        """
        for name, tokens in self.call.read.items():
            if self.register_adapter_tokens._modules.get(name) is not tokens:
                raise RegisterAdapterError(
                    f"the adapter {name!r} was deleted while the model was read with it; read it again, and delete "
                    "adapters before or afterwards"
                )

    @property
    def _is_off(self) -> bool:
        """Whether adapters are switched off for every thread."""
        return bool(self._disable_adapters or self._aside)

    def _at_start(self) -> tuple[str, ...]:
        return () if self._is_off else tuple(dict.fromkeys(self.active_names))

    @property
    def names_at_work(self) -> list[str]:
        """Names of the adapters that take part in this thread's passes: what it is to keep to, or the active ones."""
        call = self.call
        kept = call.start if call.staying is None else call.staying
        if EVERYONE in call.without:
            return []
        names = dict.fromkeys(self._at_start() if kept is None else kept)
        return [name for name in names if name not in call.without]

    def _segments_by_image(self, images: list[str]) -> list[Segment]:
        names = [name for name in dict.fromkeys(images) if name != BASE]
        if not names:
            return []
        placement = max(self.placements[name] for name in names)
        order = {BASE: -1, **{name: index for index, name in enumerate(names)}}
        return [Segment(placement, [self.tokens(name) for name in names], [order[name] for name in images])]

    @property
    def disable_adapters(self) -> bool:
        """Whether no adapter takes part in this thread's passes."""
        without = self.call.without
        everyone = self._disable_adapters or self._aside > 0 or EVERYONE in without
        return everyone or (bool(self.names) and without.issuperset(self.names))

    @contextmanager
    def without(self, names: Iterable[str]) -> Iterator[None]:
        """Leave adapters out of the passes that this thread, or coroutine, makes in the context.

        PEFT's own switch is every thread's, and a compiled model goes by its thread alone.

        Args:
            names: Names of adapters; those that the layer does not have are passed over. With :data:`EVERYONE` among
                them it is all of them.
        """
        try:
            with self.call.leaving_out(names):
                self.show_labels()
                yield
        finally:
            self.show_labels()

    @contextmanager
    def images_with(self, adapter_names: list[str]) -> Iterator[None]:
        """Give every image of the batches in this context the adapter of its own.

        Args:
            adapter_names: One name an image; ``"__base__"`` for an image without registers.

        Raises:
            ValueError: The layer is in training mode, the adapters enter at different places, or they have different
                numbers of registers and the model does not let keys be masked.
        """
        names = [name for name in dict.fromkeys(adapter_names) if name != BASE]
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call model.eval() first")
        places = {self.placements[name]._replace(num_registers=0, full_attentions=False) for name in names}
        if len(places) > 1:
            raise ValueError(
                "adapter_names= mixes adapters that enter at different places (insert_layer, deep, key_value): "
                f"{ {name: self.placements[name] for name in names} }. Run one batch for each."
            )
        counts = {0 if name == BASE else self.placements[name].num_registers for name in adapter_names}
        ragged = bool(names) and len(counts) > 1
        if ragged and not reads_implementation(self.tower):
            raise ValueError(
                f"adapter_names= mixes different numbers of registers, and {type(self.tower.module).__name__} has no "
                "place where the keys of the missing ones could be masked. Run one batch for each number."
            )
        if ragged:
            self._enter_attention()
        images = list(adapter_names)
        handles = self._head_hooks(images)
        before, self.call.images = self.call.images, images
        try:
            yield
        finally:
            self.call.images = before
            for handle in handles:
                handle.remove()

    def _head_hooks(self, images: list[str]) -> list[Any]:
        """Hooks on the modules of ``modules_to_save``, of which each image has its adapter's own, as in PEFT."""
        inside = set(map(id, self.tower.module.modules()))
        around = self.labels.model or self.tower.module
        return [
            module.register_forward_hook(partial(self._head_hook, images, id(module) in inside), with_kwargs=True)
            for module in list(around.modules())
            if isinstance(module, ModulesToSaveWrapper) and not set(self.names).isdisjoint(module.modules_to_save)
        ]

    def _head_hook(self, images: list[str], inside: bool, module: Any, args: Any, *rest: Any) -> Any:
        # Not for another thread's pass, nor for one that runs inside of this one's: its head comes while this one runs.
        if self.call.images is not images or self.disable_adapters or (self.call.segments is not None and not inside):
            return None
        names = [BASE if name in self.call.without else name for name in images]
        names = names_for_head(module, names, self.names)
        *kwargs, _ = rest  # torch leaves them out for a moment while another thread takes its hook off
        return module._mixed_batch_forward(*args, adapter_names=names, **(kwargs[0] if kwargs else {}))

    @property
    def _cuts_attentions(self) -> bool:
        names = self.active_names if self.call.images is None else self.call.images
        return not any(self.placements[name].full_attentions for name in names if name in self.placements)
