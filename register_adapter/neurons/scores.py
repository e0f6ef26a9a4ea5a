"""Which hidden units write the outliers: sums over images, on the model's device, and a score for every unit.

"Vision Transformers Don't Need Trained Registers" (arXiv 2506.08010) ranks post-activation MLP units by their mean
|activation| on outlier patches, in the blocks up to the one where outliers appear. That mean is high for units that are
always on, too. Here a unit is ranked by what it adds to the outliers: its mean activation there less that on the other
patches, times what it writes along the direction in which outliers differ from the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import nn

from ..artifacts.rules.threshold import Threshold
from ..features.threads import in_this_thread
from ..towers.calls import first_of
from ..towers.tower import Tower
from ..tuner.layer import RegisterLayer

__all__ = ["Neuron", "NeuronScores", "ScoreSums", "pool", "run_up_to"]


class Neuron(NamedTuple):
    """A candidate.

    Attributes:
        score: What it adds to an outlier along the outliers' direction, over the length of that direction.
        block: Index of the block.
        unit: Index of the hidden unit of the block's MLP.
        usual: Its mean activation on patches that are not outliers.
        limit: |activation| that is six standard deviations beyond the mean there.
    """

    score: float
    block: int
    unit: int
    usual: float
    limit: float


class _StopForward(Exception):  # noqa: N818 - no error
    """Ends a forward pass behind the last block that matters."""


@contextmanager
def _stop_behind(block: nn.Module) -> Iterator[None]:
    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _StopForward

    handle = block.register_forward_hook(in_this_thread(stop))
    try:
        yield
    finally:
        handle.remove()


def run_up_to(tower: Tower, block: int, inputs: torch.Tensor | Mapping[str, Any]) -> None:
    """Run a tower up to and with block ``block``; what comes later is not computed."""
    with _stop_behind(tower.part("blocks")[block]):
        try:
            tower.run(inputs)
        except _StopForward:
            return


def _total(values: torch.Tensor) -> torch.Tensor:
    """``(M,)``: the sum over all tokens ``(…, M)``."""
    # One dimension after the other: both at once take 30 times as long on a CPU where tokens are sliced off.
    while values.ndim > 1:
        values = values.sum(-2)
    return values


class _Sums:
    """Count, sums and sums of squares over tokens, ``(M,)``, float64 where the device has it."""

    def __init__(self, count: Any = 0, first: Any = 0, second: Any = 0) -> None:
        self.count, self.first, self.second = count, first, second

    def add(self, values: torch.Tensor, zeros: int = 0) -> None:
        """Add tokens ``(…, M)``; with some zeros among them that stand for none, they are overwritten."""
        kind = torch.float32 if values.device.type == "mps" else torch.float64
        self.count = self.count + values.shape[:-1].numel() - zeros
        self.first = self.first + _total(values).to(kind)
        self.second = self.second + _total(values.square_() if zeros else values.square()).to(kind)

    def moved(self) -> _Sums:
        """The same on the CPU."""
        return _Sums(self.count, *(v.cpu() if isinstance(v, torch.Tensor) else v for v in (self.first, self.second)))

    def plus(self, other: _Sums) -> _Sums:
        """The sums over both."""
        return _Sums(self.count + other.count, self.first + other.first, self.second + other.second)

    @property
    def mean(self) -> torch.Tensor:
        """``(M,)``."""
        return torch.as_tensor(self.first / max(self.count, 1))

    @property
    def std(self) -> torch.Tensor:
        """``(M,)``."""
        return torch.as_tensor((self.second / max(self.count, 1) - self.mean.square()).clamp_min(0).sqrt())


class ScoreSums(NamedTuple):
    """Number of images, and sums by block over outliers and over the others; block -1 is the top block's output."""

    num_images: int
    outliers: dict[int, _Sums]
    others: dict[int, _Sums]


class NeuronScores:
    """What the units of blocks 0 to ``top`` do on outliers and on other patches.

    Args:
        tower: The vision tower, with or without registers.
        threshold: Which patches are outliers, by their norm behind block ``top``.
        top: Index of the block behind which outliers appear.
        first: Index of the first block to look at.
    """

    def __init__(self, tower: Tower, threshold: Threshold, top: int, first: int = 0) -> None:
        self.tower, self.threshold, self.top = tower, threshold, top
        self.blocks = [block for block in range(first, top + 1) if tower.block_part(block, "mlp_out") is not None]
        self._outliers = {block: _Sums() for block in [*self.blocks, -1]}
        self._others = {block: _Sums() for block in [*self.blocks, -1]}
        self._seen: dict[int, torch.Tensor] = {}
        registers = getattr(tower.module, "registers", None)
        self._layer = registers if isinstance(registers, RegisterLayer) else None
        self.num_images = 0

    def _patches(self, block: int, tokens: torch.Tensor) -> torch.Tensor:
        count = self._layer.count_at(block) if self._layer is not None else 0
        return tokens[:, self.tower.prefix + count :]

    @contextmanager
    def attach(self) -> Iterator[None]:
        """Add what units do in every forward pass of the tower that is made inside, whole or up to the top block."""
        with ExitStack() as stack:
            for block in self.blocks:
                last = self.tower.block_part(block, "mlp_out")
                stack.callback(last.register_forward_pre_hook(in_this_thread(partial(self._keep, block))).remove)
            behind: nn.Module = self.tower.part("blocks")[self.top]
            stack.callback(behind.register_forward_hook(in_this_thread(self._finish), prepend=True).remove)
            stack.callback(self._seen.clear)
            yield

    @torch.no_grad()
    def add(self, inputs: torch.Tensor | Mapping[str, Any]) -> None:
        """Run the tower up to the last block that matters, and add what its units do."""
        with self.attach():
            run_up_to(self.tower, self.top, inputs)

    def _keep(self, block: int, module: nn.Module, args: Any) -> None:
        self._seen[block] = args[0]

    @torch.no_grad()
    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = self._patches(self.top, first_of(output)).float()
        images, places = self.threshold.mask(hidden).nonzero(as_tuple=True)
        self.num_images += len(hidden)
        for block, values in [*self._seen.items(), (-1, hidden)]:
            tokens = self._patches(block, values).float() if block >= 0 else values
            where = images.to(tokens.device), places.to(tokens.device)
            self._outliers[block].add(tokens[where])
            # Not all less the outliers: next to those, what the others do is less than a rounding error.
            if len(images):
                tokens = tokens.clone()
                tokens[where] = 0.0
            self._others[block].add(tokens, zeros=len(images))
        self._seen.clear()

    def sums(self) -> ScoreSums:
        """All that was summed, on the CPU, as :meth:`set_sums` takes it."""
        outliers, others = ({k: v.moved() for k, v in table.items()} for table in (self._outliers, self._others))
        return ScoreSums(self.num_images, outliers, others)

    def set_sums(self, parts: Sequence[ScoreSums]) -> None:
        """Have the sums of several processes, in place of those of this one."""
        self.num_images = sum(part.num_images for part in parts)
        for block in self._others:
            self._outliers[block] = reduce(_Sums.plus, (part.outliers[block] for part in parts))
            self._others[block] = reduce(_Sums.plus, (part.others[block] for part in parts))

    @property
    def num_outliers(self) -> int:
        """Number of outlier patches seen."""
        return int(self._outliers[-1].count)

    def ranked(self, most: int) -> list[Neuron]:
        """The ``most`` units that add most to the outliers, the first first."""
        direction = (self._outliers[-1].mean - self._others[-1].mean).double().cpu()
        length = direction.norm().clamp_min(1e-12)
        neurons: list[Neuron] = []
        for block in self.blocks:
            outliers, others = self._outliers[block], self._others[block]
            usual, spread = others.mean.double().cpu(), others.std.double().cpu()
            more = outliers.mean.double().cpu() - usual
            score = (more * self._written(block, direction / length)).abs() / length
            best = score.topk(min(most, len(score)))
            limit = usual.abs() + 6 * spread
            neurons += [
                Neuron(value, block, unit, float(usual[unit]), float(limit[unit]))
                for value, unit in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        return sorted(neurons, key=lambda neuron: -neuron.score)[:most]

    def _written(self, block: int, direction: torch.Tensor) -> torch.Tensor:
        """``(M,)``: what each unit writes along a direction ``(D,)`` when its activation is one."""
        last = self.tower.block_part(block, "mlp_out")
        last = getattr(last, "base_layer", last)  # an adapter's layer (LoRA) around it
        scale = self.tower.block_part(block, "mlp_scale")
        if isinstance(scale, torch.Tensor):
            direction = direction * scale.detach().double().cpu()
        weight = last.weight.detach()
        if not weight.is_floating_point():
            # Quantised weights cannot be read; the layer itself says what it writes.
            units = torch.eye(last.in_features, dtype=torch.float32, device=weight.device)
            written = last(units) - last(torch.zeros_like(units[:1]))
            weight = written.detach().T
        along: torch.Tensor = weight.double().cpu().T @ direction
        return along


def pool(ranked: list[list[Neuron]], most: int) -> list[Neuron]:
    """One ranking of several: scores and usual activations are averaged, limits are the widest."""
    by_unit: dict[tuple[int, int], list[Neuron]] = {}
    for neuron in (neuron for ranking in ranked for neuron in ranking):
        by_unit.setdefault((neuron.block, neuron.unit), []).append(neuron)
    pooled = [
        Neuron(
            sum(neuron.score for neuron in same) / len(ranked),
            block,
            unit,
            sum(neuron.usual for neuron in same) / len(same),
            max(neuron.limit for neuron in same),
        )
        for (block, unit), same in by_unit.items()
    ]
    return sorted(pooled, key=lambda neuron: -neuron.score)[:most]
