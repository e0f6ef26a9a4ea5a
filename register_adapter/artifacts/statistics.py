"""One streaming pass over images: everything an audit needs, reduced on the model's device, nothing kept of a token.

:func:`collect_statistics` puts hooks on a vision tower; every forward pass inside adds to the :class:`Statistics`.
Hidden states are read before the final LayerNorm, at every block; index 0 is the input of the first block, ``i + 1``
the output of block ``i``. Rules are applied afterwards, to what was summed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..features.attention_maps import record_attention_maps
from ..features.layout import native_registers
from ..features.passes import Batch
from ..features.threads import in_this_thread
from ..towers.anatomy import resolve
from ..towers.calls import first_of, hidden_states_of
from ..towers.tower import Tower
from ..tuner.layer import RegisterLayer
from .attention_sketch import AttentionSketch, Layout
from .block_values import BlockValues
from .norms import similarity_of
from .patch_sketch import Array, PatchSketch
from .rules.histogram import NormHistogram, bin_centres, bins_of
from .sink_sketch import SinkRecorder, SinkSketch

__all__ = ["Statistics", "collect_statistics"]

# Where a model without a 2-D convolution says the grid of each image, and what embeds its patches then.
_SHAPES, _LINEAR = "spatial_shapes", "embeddings.patch_embedding"
# Inputs that say which patches are padding.
_MASKS = ("pixel_attention_mask", "patch_attention_mask", "attention_mask")


class Statistics:
    """What an audit needs of the forward passes of a tower, summed; its size does not grow with their number.

    It is a consumer of a pass over images (:func:`register_adapter.features.passes.open_pass`), and what
    :func:`collect_statistics` gives.

    Args:
        tower: A vision tower, with or without registers.
        attentions: Sum attention maps too.
        sinks: Sum attention sinks too, for which attention maps are needed.

    Raises:
        ValueError: Sinks without attention maps.

    Attributes:
        tower: The vision tower.
        num_images: Number of images.
        patches: By layer, what is kept of the patches.
        others: By layer and kind (``"cls"``, ``"register"``), norms of these tokens.
        attentions: By block; empty without attention statistics.
        sinks: What is kept of sinks, ``None`` if they were not asked for.
        grid: ``(h, w)`` patches, ``None`` where places are not known.
        no_grid: Why not, ``""`` where they are.
        attends: Whether attention maps are summed in the passes to come.
    """

    def __init__(self, tower: Tower, attentions: bool = True, sinks: bool = False) -> None:
        if sinks and not attentions:
            raise ValueError("sinks are told by attention maps: leave out attentions=False, or sinks=True")
        self.tower = tower
        self.num_images = 0
        self.patches: dict[int, PatchSketch] = {}
        self.others: dict[int, dict[str, NormHistogram]] = {}
        self.attentions: dict[int, AttentionSketch] = {}
        self.values = BlockValues(tower)
        self.sinks = SinkRecorder(self.values) if sinks else None
        self.grid: tuple[int, int] | None = None
        self.no_grid = ""
        registers = getattr(tower.module, "registers", None)
        self._layer = registers if isinstance(registers, RegisterLayer) else None
        self.attends = attentions
        self._cls = tower.prefix - native_registers(tower)
        self._batch = _Batch()

    @contextmanager
    def attach(self) -> Iterator[None]:
        """Add what every forward pass of the tower shows inside; see :func:`collect_statistics`."""
        embedding = self.tower.part("patch_embedding") or resolve(self.tower.module, _LINEAR)
        blocks: nn.ModuleList = self.tower.part("blocks")
        with ExitStack() as stack:
            stack.callback(
                self.tower.module.register_forward_pre_hook(in_this_thread(self._start), with_kwargs=True).remove
            )
            if isinstance(embedding, nn.Module):
                stack.callback(embedding.register_forward_hook(in_this_thread(self._embedded)).remove)
            stack.callback(blocks[0].register_forward_pre_hook(in_this_thread(self._first), with_kwargs=True).remove)
            for index, block in enumerate(blocks):
                hook = partial(self._after, index)
                stack.callback(block.register_forward_hook(in_this_thread(hook), prepend=True).remove)
            if self.attends:
                stack.enter_context(self.values.attach())
                stack.enter_context(record_attention_maps(self.tower, self._attend))
            yield

    def take(self, batch: Batch) -> None:
        """Nothing is left to do after a forward pass: all is summed during it."""

    def sums(self, device: torch.device) -> Sums:
        """All that was summed, on a device, as :meth:`add_sums` of another process takes it."""
        moved = copy.deepcopy((self.patches, self.others, self.attentions, self._sink_sketches))
        norms = [histogram for kinds in moved[1].values() for histogram in kinds.values()]
        sketches = [*moved[0].values(), *norms, *moved[2].values(), *moved[3].values()]
        for sketch in sketches:
            _move(sketch, device)
        missing = "" if self.sinks is None else self.sinks.missing
        return Sums(self.num_images, *moved, self.grid, self.no_grid, missing)

    def add_sums(self, other: Sums) -> None:
        """Add what another process has summed over other images with the same model."""
        if not other.num_images:
            return
        same = not self.num_images or (self.grid == other.grid and not self.no_grid)
        if not self.num_images:
            self.grid, self.no_grid = other.grid, other.no_grid
        elif not same or other.no_grid:
            self.grid, self.no_grid = None, self.no_grid or other.no_grid or "the images have different sizes"
        self.num_images += other.num_images
        _merge(self.patches, other.patches)
        _merge(self.attentions, other.attentions)
        _merge(self._sink_sketches, other.sinks)
        if self.sinks is not None:
            self.sinks.missing = self.sinks.missing or other.no_sinks
        for layer, kinds in other.others.items():
            _merge(self.others.setdefault(layer, {}), kinds)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        sketches: list[Any] = [h for kinds in self.others.values() for h in kinds.values()]
        sketches += [*self.patches.values(), *self.attentions.values(), *self._sink_sketches.values()]
        return sum(tensor.nbytes for sketch in sketches for tensor in sketch.tensors())

    @property
    def num_registers(self) -> int:
        """Number of registers of active adapters in the sequence as it leaves the last block."""
        return 0 if self._layer is None else self._layer.num_active

    def norms(self, layer: int) -> tuple[Array, Array]:
        """Norms of the patches at one layer as a rule takes them: ``(BINS,)`` values and how often each is there."""
        return bin_centres(), self.patches[layer].counts()

    @property
    def _sink_sketches(self) -> dict[int, SinkSketch]:
        return {} if self.sinks is None else self.sinks.sketches

    def _count_at(self, layer: int) -> int:
        return 0 if self._layer is None else self._layer.count_at(max(layer - 1, 0))

    def _start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._batch = _Batch(dict(kwargs))

    @torch.no_grad()
    def _embedded(self, module: nn.Module, args: Any, output: Any) -> None:
        """Behind the patch embedding: the grid, and how similar a patch is to its neighbours."""
        if not isinstance(output, torch.Tensor):
            return
        features = output if output.ndim == 4 else self._batch.on_grid(output)
        if features is not None:
            self._batch.grid = (features.shape[2], features.shape[3])
            self._batch.similarity = similarity_of(features).flatten(1)

    def _first(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = hidden_states_of(args, kwargs)
        start = self.tower.prefix + self._count_at(0)
        self._batch.settle(hidden, hidden.shape[1] - start)
        self._settle_grid()
        self.num_images += hidden.shape[0]
        self._take(0, hidden)

    def _settle_grid(self) -> None:
        batch = self._batch
        if self.no_grid:
            return
        if batch.no_grid or (self.grid is not None and self.grid != batch.grid):
            self.no_grid = batch.no_grid or "the images have different sizes"
            self.grid = None
        else:
            self.grid = batch.grid

    def _after(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        self._take(index + 1, first_of(output))

    @torch.no_grad()
    def _take(self, layer: int, hidden: torch.Tensor) -> None:
        batch = self._batch
        start = self.tower.prefix + self._count_at(layer)
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
        bins = bins_of(norms)
        if layer not in self.patches:
            self.patches[layer], self.others[layer] = PatchSketch(hidden.device), {}
        end = start + batch.patches
        valid, similarity = batch.on(hidden.device)
        batch.bins = bins[:, start:end]
        self.patches[layer].add(
            hidden[:, start:end], norms[:, start:end], batch.bins, valid, similarity, not self.no_grid
        )
        for kind, first, last in (("cls", 0, self._cls), ("register", self._cls, start)):
            if last > first:
                histogram = self.others[layer].setdefault(kind, NormHistogram(hidden.device))
                counts = torch.zeros_like(histogram.counts)
                place = bins[:, first:last].flatten()
                histogram.add(norms[:, first:last], counts.scatter_add_(0, place, torch.ones_like(place)))

    @torch.no_grad()
    def _attend(self, block: int, attention: torch.Tensor) -> None:
        """What goes to the patches is binned by the norms where the block reads them, at layer ``block``."""
        batch = self._batch
        count = 0 if self._layer is None else self._layer.count_at(block)
        layout = Layout(self._cls, self.tower.prefix + count, batch.patches)
        if block not in self.attentions:
            self.attentions[block] = AttentionSketch(attention.device, attention.shape[1], self._cls > 0)
        assert batch.bins is not None
        valid, _ = batch.on(attention.device)
        bins = batch.bins.to(attention.device)
        take = self.attentions[block].add(attention, bins, layout, valid)
        self.values.hand(block, take)
        if self.sinks is not None:
            self.sinks.see(block, attention, bins, layout, valid)


@dataclass
class Sums:
    """What :class:`Statistics` has summed; see there."""

    num_images: int
    patches: dict[int, PatchSketch]
    others: dict[int, dict[str, NormHistogram]]
    attentions: dict[int, AttentionSketch]
    sinks: dict[int, SinkSketch]
    grid: tuple[int, int] | None
    no_grid: str
    no_sinks: str


def _move(sketch: Any, device: torch.device) -> None:
    """Put the tensors of a sketch, and of what it holds, on a device."""
    for name, value in vars(sketch).items():
        if isinstance(value, torch.Tensor):
            setattr(sketch, name, value.to(device))
        elif isinstance(value, NormHistogram):
            _move(value, device)


def _merge(own: dict[Any, Any], theirs: dict[Any, Any]) -> None:
    """Add sketches to those of the same key."""
    for key, sketch in theirs.items():
        if key in own:
            own[key].merge(sketch)
        else:
            own[key] = sketch


class _Batch:
    """What is known of the batch that is going through the tower."""

    def __init__(self, inputs: Mapping[str, Any] | None = None) -> None:
        self.inputs = inputs or {}
        self.grid: tuple[int, int] | None = None
        self.no_grid = ""
        self.patches = 0
        self.valid: torch.Tensor | None = None
        self.similarity: torch.Tensor | None = None
        self.bins: torch.Tensor | None = None

    def on_grid(self, output: torch.Tensor) -> torch.Tensor | None:
        """``(B, D, h, w)`` from what a linear layer returns, ``(B, P, D)``, if all images have one known grid."""
        shapes = self.inputs.get(_SHAPES)
        if shapes is None or output.ndim != 3:
            return None
        grids = {tuple(shape) for shape in shapes.tolist()}
        if len(grids) != 1:
            self.no_grid = "the images have different sizes"
            return None
        height, width = grids.pop()
        return output[:, : height * width].transpose(1, 2).reshape(len(output), -1, height, width)

    def settle(self, hidden: torch.Tensor, number: int) -> None:
        """Say which of the ``number`` tokens behind the prefix are patches, once there is a sequence ``(B, N, D)``."""
        batch = hidden.shape[0]
        fits = self.similarity is not None and self.similarity.shape[0] == batch
        if self.grid is None or not fits:
            self.no_grid = self.no_grid or "its patches are not embedded by a 2-D convolution, once for each image"
        elif self.grid[0] * self.grid[1] > number:
            self.no_grid = "the model hides some of the patches"
        if self.no_grid or self.grid is None:
            self.grid = self.similarity = None
            self.patches = number
            self.valid = self._padding(batch, number)
        else:
            # Behind the patches there may be padding, or tokens for detections.
            self.patches = self.grid[0] * self.grid[1]

    def _padding(self, batch: int, number: int) -> torch.Tensor | None:
        for name in _MASKS:
            mask = self.inputs.get(name)
            if isinstance(mask, torch.Tensor) and mask.numel() == batch * number:
                return (mask.reshape(batch, number) > 0).float()
        return None

    def on(self, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """``valid`` and ``similarity`` on a device: a model may lie on several."""
        valid, similarity = self.valid, self.similarity
        return (
            None if valid is None else valid.to(device),
            None if similarity is None else similarity.to(device),
        )


@contextmanager
def collect_statistics(tower: Tower, attentions: bool = True, sinks: bool = False) -> Iterator[Statistics]:
    """Sum what an audit needs over every forward pass of a tower that is made inside the context.

    Every pass adds. Hooks, and the attention implementation, are as before on the way out, also after an exception.

    Args:
        tower: A vision tower, with or without registers.
        attentions: Sum attention maps too; without them fused attention stays in use.
        sinks: Sum attention sinks too, for which attention maps are needed.

    Yields:
        The :class:`Statistics`.

    Raises:
        UnsupportedModelError: As for :func:`~register_adapter.features.record_attention_maps`.
        ValueError: Sinks without attention maps.

    Example:
        >>> with collect_statistics(find_tower(model), attentions=False) as statistics:
        ...     for pixel_values in batches:
        ...         model(pixel_values=pixel_values)
        >>> threshold = RULES["auto"](*statistics.norms(8))
    """
    statistics = Statistics(tower, attentions, sinks)
    with statistics.attach():
        yield statistics
