"""Planted artifacts: a copy of a clean model in which a few MLP neurons do what register neurons do in large models.

This is a construction, made so that repair can be measured against a ground truth: the model before planting is the
**clean twin**. In large ViTs a handful of MLP neurons of one block fires on a few low-information patches and writes a
large vector into them ("Vision Transformers Don't Need Trained Registers", arXiv 2506.08010); from that block on those
patches have outlying norms and draw attention to themselves. :func:`plant_artifacts` overwrites a few hidden units of
one block, the least used ones, so that they behave so.

The signature follows "Vision Transformers Need Registers" (arXiv 2309.16588): about 2 % of the patches, at least 5
times the median norm, bimodal, on patches similar to their neighbours. The neurons come in pairs,
``act(a) - act(a - c)``, a ramp that saturates, so that a patch is either hit in full or not at all. Their direction is
fitted under perturbation (random registers, pixel noise, another resolution) with a penalty on whatever a perturbation
moves: a direction fitted on clean activations alone falls silent as soon as any four tokens are added, and every repair
would then look good.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..artifacts.norms import neighbour_similarity
from ..errors import UnsupportedModelError
from ..features.trace import capture
from ..towers.tower import Tower, find_tower
from .plant_views import Target, Tokens, View, inputs_of, look
from .scenes import SceneDataset

__all__ = ["Planting", "plant_artifacts"]

#: Height of the ramp: what a pair of neurons sends on, in units of activation, for a patch that is hit.
_HEIGHT = 10.0


_VIEWS = (
    View(),
    View(4),
    View(4),
    View(4),
    View(4, std=0.2),
    View(1),
    View(8),
    View(16),
    View(noise=0.05),
    View(scale=1.4),
)


def _fit_direction(views: list[Tokens], steps: int = 100) -> torch.Tensor:
    """A direction ``(D,)``: logistic regression on targets, plus a penalty on what the perturbations move."""
    clean = views[0]
    inputs = torch.cat([part for view in views for part in (view.others, view.patches.flatten(0, 1))])
    targets = torch.cat(
        [part.float() for view in views for part in (torch.zeros(len(view.others)), view.targets.flatten())]
    )
    moved = [view.patches - clean.patches for view in views[1:] if view.patches.shape == clean.patches.shape]
    shifts = torch.cat([part.flatten(0, 1) for part in moved])
    mean, std = inputs.mean(0), inputs.std(0).clamp_min(1e-6)
    inputs, shifts = (inputs - mean) / std, shifts / std
    movement = shifts.T @ shifts / len(shifts)
    weights = torch.where(targets > 0, 0.5 / targets.mean().clamp_min(1e-6), 0.5 / (1 - targets).mean())
    direction = torch.zeros(inputs.shape[1], requires_grad=True)
    offset = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([direction, offset], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(inputs @ direction + offset, targets, weights)
        loss = loss + 1e-3 * direction.square().sum() + 0.3 * direction @ movement @ direction
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return direction.detach() / std


def _threshold_and_gain(direction: torch.Tensor, clean: Tokens, share: float) -> tuple[float, float]:
    """Where the ramp begins, and how steep it is: a tenth of the patches hit may lie on it."""
    scores = (clean.patches @ direction).flatten()
    others = (clean.others @ direction).tolist()  # none where there is no CLS
    threshold = max([scores.quantile(1 - share).item(), *others])
    over = scores[scores > threshold] - threshold
    return threshold, _HEIGHT / over.quantile(0.1).clamp_min(1e-6).item()


def _write_pair(
    tower: Tower, block: int, pair: list[int], direction: torch.Tensor, threshold: float, gain: float
) -> None:
    """Let two hidden units together send ``_HEIGHT`` where the score is over the threshold, and nothing below it."""
    gate, up = tower.block_part(block, "mlp_in"), tower.block_part(block, "mlp_up")
    units = tower.block_part(block, "mlp_out").weight.shape[1]
    before = 0
    if up is None and len(gate.weight) == 2 * units:  # both factors come out of one layer
        up, before = gate, units
    for unit, offset in zip(pair, (0.0, _HEIGHT), strict=True):
        gate.weight[unit] = (gain * direction).to(gate.weight)
        gate.bias[unit] = -gain * threshold - offset
        if up is not None:  # gated MLP: the other factor is one
            up.weight[before + unit] = 0
            up.bias[before + unit] = 1


@torch.no_grad()
def _least_used(tower: Tower, block: int, pixel_values: torch.Tensor, count: int) -> list[int]:
    """The hidden units that write least, by mean |activation| times the norm of what they write."""
    out = tower.block_part(block, "mlp_out")
    with inputs_of(out) as seen:
        tower.run(pixel_values)
    written = seen[0].abs().float().mean((0, 1)) * out.weight.float().norm(dim=0)
    return sorted(written.argsort()[:count].tolist())


def _attractive_vector(
    model: nn.Module, tower: Tower, block: int, pair: list[int], pixel_values: torch.Tensor, size: float, steps: int
) -> torch.Tensor:
    """A vector ``(D,)`` of norm ``size`` that, written into the patches hit, draws later blocks' attention to them."""
    out, scale = tower.block_part(block, "mlp_out"), tower.block_part(block, "mlp_scale")
    vector = torch.randn(out.weight.shape[0], generator=torch.Generator().manual_seed(0)).to(out.weight.device)
    vector.requires_grad_(True)
    hit: list[torch.Tensor] = []

    def scaled() -> torch.Tensor:
        centred = vector - vector.mean()  # LayerNorm removes the mean
        return torch.mul(centred, size / centred.norm())

    def write(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        sent = (args[0][..., pair[:1]] - args[0][..., pair[1:]]).float() / _HEIGHT
        hit[:] = [sent[..., 0] > 0.5]
        column = scaled() if scale is None else scaled() / scale.float()
        return torch.add(output, (sent * column).to(output.dtype))

    handle = out.register_forward_hook(write)
    optimizer = torch.optim.Adam([vector], lr=0.1)
    # Attention of CLS, or of all tokens where there is no CLS.
    asked = slice(0, 1) if tower.anatomy.prefix else slice(None)
    try:
        with torch.enable_grad(), capture(model, hidden_states=False) as trace:
            for _ in range(steps if block + 1 < len(tower.part("blocks")) else 0):
                tower.run(pixel_values)
                received = [
                    (attention[:, :, asked].mean((1, 2)) * hit[0]).sum(1) for attention in trace.attentions[block + 1 :]
                ]
                optimizer.zero_grad()
                (-torch.stack(received).clamp_min(1e-6).log().mean()).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    finally:
        handle.remove()
    return scaled().detach()


@dataclass(frozen=True)
class Planting:
    """A model with planted artifacts, and what was planted.

    Attributes:
        model: The planted copy; the model given is untouched and is its clean twin.
        block: Index of the block with the planted neurons.
        neurons: Indices of the hidden units of that block's MLP, in ascending order.
    """

    model: Any
    block: int
    neurons: tuple[int, ...]

    @torch.no_grad()
    def hits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(B, patches)`` bool: the patches that the planted neurons write into, the ground truth of a detector."""
        tower = find_tower(self.model)
        with inputs_of(tower.block_part(self.block, "mlp_out")) as seen:
            tower.run(pixel_values)
        sent = seen[0][:, tower.prefix :, list(self.neurons)].float()
        # The first of a pair is always the larger one: a pair sends the difference.
        return (sent.amax(-1) - sent.amin(-1)) > _HEIGHT / 2


def plant_artifacts(
    model: nn.Module,
    block: int | None = None,
    pixel_values: torch.Tensor | None = None,
    *,
    num_neurons: int = 4,
    strength: float = 8.0,
    share: float = 0.02,
    attraction_steps: int = 20,
    seed: int = 0,
) -> Planting:
    """A copy of a clean model with planted register neurons; see the module for what that means.

    Args:
        model: Any supported model whose MLP layers have biases. It is left as it is.
        block: Index of the block that gets the neurons; default: the middle.
        pixel_values: Images to fit on, ``(M, 3, H, W)``, as the model expects them; 64 or more with plain places.
            Default: 128 scenes, scaled to -1…1, of the size in the model's config.
        num_neurons: Number of hidden units that are overwritten, an even number.
        strength: Norm of what is written over the largest median patch norm of the blocks from that one on.
        share: Share of the patches that shall be artifacts.
        attraction_steps: Steps of the search for a vector that later blocks attend to; 0 takes a random one.
        seed: Seed of everything random.

    Returns:
        The :class:`Planting`.

    Raises:
        UnsupportedModelError: No single vision tower, or MLP layers that cannot be overwritten.
        ValueError: ``block`` is not a block of the model, or ``num_neurons`` is odd.
    """
    planted = copy.deepcopy(model).eval().requires_grad_(False)
    tower = find_tower(planted)
    blocks = len(tower.part("blocks"))
    block = (blocks - 1) // 2 if block is None else block
    if not 0 <= block < blocks:
        raise ValueError(f"block must be a block of the model, 0 to {blocks - 1}, got {block}")
    if num_neurons < 2 or num_neurons % 2:
        raise ValueError(f"num_neurons must be even and at least 2, neurons are planted in pairs; got {num_neurons}")
    gate, out = tower.block_part(block, "mlp_in"), tower.block_part(block, "mlp_out")
    if gate is None or out is None or gate.bias is None:
        raise UnsupportedModelError(
            f"block {block} of {type(tower.module).__name__} has no MLP with biases that the table describes"
        )
    pixel_values = _default_images(tower, seed) if pixel_values is None else pixel_values
    pixel_values = pixel_values.to(gate.weight)

    target = Target.choose(neighbour_similarity(tower, pixel_values).cpu(), share, seed)
    views = [
        look(planted, tower, block, pixel_values, view, target, seed + number) for number, view in enumerate(_VIEWS)
    ]
    direction = _fit_direction(views)
    threshold, gain = _threshold_and_gain(direction, views[0], share)
    with torch.no_grad(), capture(planted, attentions=False) as trace:
        tower.run(pixel_values)
    median = max(trace.patches(index).float().norm(dim=-1).median().item() for index in range(block + 1, blocks + 1))
    units = _least_used(tower, block, pixel_values, num_neurons)
    pairs = [units[start : start + 2] for start in range(0, num_neurons, 2)]
    with torch.no_grad():
        for pair in pairs:
            _write_pair(tower, block, pair, direction, threshold, gain)
        out.weight[:, units] = 0
    vector = _attractive_vector(planted, tower, block, pairs[0], pixel_values[:64], strength * median, attraction_steps)
    _write_columns(tower, block, pairs, vector)
    for copied, original in zip(planted.parameters(), model.parameters(), strict=True):
        copied.requires_grad_(original.requires_grad)
    return Planting(planted.train(model.training), block, tuple(units))


@torch.no_grad()
def _write_columns(tower: Tower, block: int, pairs: list[list[int]], vector: torch.Tensor) -> None:
    """Let the pairs together write ``vector`` into a patch that is hit."""
    out, scale = tower.block_part(block, "mlp_out"), tower.block_part(block, "mlp_scale")
    column = (vector if scale is None else vector / scale.float()) / (_HEIGHT * len(pairs))
    for first, second in pairs:
        out.weight[:, first] = column.to(out.weight)
        out.weight[:, second] = -column.to(out.weight)


def _default_images(tower: Tower, seed: int) -> torch.Tensor:
    """``(128, 3, S, S)`` scenes of the model's own size, scaled to -1…1."""
    size = getattr(tower.config, "image_size", None)
    side = size[0] if isinstance(size, list | tuple) else size
    if not isinstance(side, int):
        raise ValueError("the model's config does not say an image_size; give pixel_values")
    scenes = SceneDataset(128, size=side, seed=seed)
    images = torch.stack([torch.from_numpy(scenes.scene(index).image) for index in range(len(scenes))])
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
