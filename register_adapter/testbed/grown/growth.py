"""Seeds that grow side by side, and what is measured of them on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from ...artifacts.norms import summarise_norms
from ...features.trace import capture
from .mixes import mixed
from .mosaics import Mosaics, MosaicTask, summary_of
from .recipes import GrownModel, Recipe, build

__all__ = ["Drawn", "Ensemble", "losses", "measure", "weighted_error"]

#: Seed of the images that models are measured on.
_TEST_SEED = 999_999_937


class Ensemble(nn.Module):
    """Models of one recipe with other seeds, computed side by side; none knows of the others.

    Their parameters are stacked, so that the sum of their losses gives each the gradient that it has alone.

    Args:
        recipe: What they are.
        seeds: One for each.
    """

    def __init__(self, recipe: Recipe, seeds: Sequence[int]) -> None:
        super().__init__()
        models = [build(recipe, seed) for seed in seeds]
        for model in models:
            backbone: Any = model.backbone
            backbone.set_attn_implementation("eager")  # the others have no rule for vmap
        stacked, _ = stack_module_state(models)
        self.names = list(stacked)
        self.stacked = nn.ParameterList(nn.Parameter(values.detach()) for values in stacked.values())
        self._one = [models[0]]  # in a list, so that its parameters are not the ensemble's
        self.recipe, self.seeds = recipe, tuple(seeds)

    def forward(self, pixel_values: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Predictions ``(E, B, prefix + P, num_targets)`` for pixels ``(E, B, 3, H, W)`` and what else models take."""
        return self.predict(list(self.stacked), pixel_values, *others)

    def predict(self, parameters: Sequence[torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """The same with these parameters in place of its own, stacked, in the order of ``names``."""

        def call(values: dict[str, torch.Tensor], *each: torch.Tensor) -> torch.Tensor:
            predictions: torch.Tensor = functional_call(self._one[0], values, each)
            return predictions

        predictions: torch.Tensor = torch.vmap(call)(dict(zip(self.names, parameters, strict=True)), *inputs)
        return predictions

    def groups(self) -> list[dict[str, Any]]:
        """Parameters for an optimiser: those that decay, and the rest."""
        decayed, named = self._one[0].decayed(), list(zip(self.names, self.stacked, strict=True))
        return [
            {"params": [value for name, value in named if name in decayed], "weight_decay": self.recipe.weight_decay},
            {"params": [value for name, value in named if name not in decayed], "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def models(self) -> list[GrownModel]:
        """Each model by itself, in the order of the seeds, in ``eval()`` mode, on the ensemble's device."""
        apart = []
        for index in range(len(self.seeds)):
            model = copy.deepcopy(self._one[0]).to(self.stacked[0].device).eval()
            own = dict(model.named_parameters())
            for name, values in zip(self.names, self.stacked, strict=True):
                own[name].copy_(values[index])
            apart.append(model)
        return apart


class Drawn(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The batches of a run, one for each step: ``E`` models see ``E`` different ones.

    Args:
        recipe: What is drawn, and how many steps there are.
        seeds: The models' seeds.
    """

    def __init__(self, recipe: Recipe, seeds: Sequence[int]) -> None:
        self.recipe, self.seeds = recipe, seeds

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """``images`` ``(E, B, 3, H, W)`` uint8, ``targets`` ``(E, B, P, T)``, ``weights`` ``(E, B, P)`` of a step.

        ``numbers`` ``(E,)``, int64, are seeds for what an objective draws.
        """
        task, count = self.recipe.task, self.recipe.batch_size
        numbers = [(1 + seed) * 10_000_019 + step for seed in self.seeds]
        drawn = [mixed(task.draw(count, number), task.grid, self.recipe.mix, number) for number in numbers]
        names = ("images", "targets", "weights")
        stacked = {name: torch.stack([getattr(batch, name) for batch in drawn]) for name in names}
        return {**stacked, "numbers": torch.tensor(numbers)}


def weighted_error(
    predictions: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, over: tuple[int, ...] = (-1,)
) -> torch.Tensor:
    """Weighted mean of the squared errors of ``(..., P, T)`` predictions, over these dimensions of ``(..., P)``."""
    squared = (predictions - targets).square().mean(-1)
    return (squared * weights).sum(over) / weights.sum(over)


def losses(predictions: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Loss of each model ``(E,)``, from predictions ``(E, B, prefix + P, T)``: the weighted mean of squared errors.

    CLS has a loss of its own where the recipe says so: it predicts the image's mean target. A query behind the last
    block predicts the image's summary, whose numbers weigh as much as if every tile said it.
    """
    task = recipe.task
    loss = weighted_error(predictions[..., -targets.shape[-2] :, :], targets, weights, (-1, -2))
    if recipe.cls and recipe.cls_loss:
        wanted = targets.mean(-2) * 4
        loss = loss + recipe.cls_loss * (predictions[..., 0, :] - wanted).square().mean((-1, -2))
    if task.summary_at == "pooled":
        wanted = summary_of(task, targets[..., : task.contents])
        missed = (predictions[..., 0, -task.summary :] - wanted).square()
        loss = loss + missed.sum(-1).mean(-1) / task.num_targets
    return loss


@torch.no_grad()
def measure(
    model: GrownModel,
    task: MosaicTask,
    count: int = 128,
    batch_size: int = 64,
    held_out: Callable[[GrownModel, Mosaics], float] | None = None,
) -> dict[str, Any]:
    """What a model does on held-out images.

    Args:
        model: The model, in ``eval()`` mode.
        task: What it learns.
        count: Images.
        batch_size: How many at a time.
        held_out: The loss of a model on a batch; by default the weighted mean of squared errors.

    Returns:
        ``loss``, and for the patch tokens behind every block (entry 0: that enter the first), before the final
        LayerNorm: ``ratio`` (largest L2 norm over the median), ``outliers`` (share over 3 times the median),
        ``on_background`` (share of those that lie on background tiles, ``None`` without any); and for every block
        ``attention``: the share that all other tokens give to outliers of its input, the mean of heads.
    """
    drawn = [task.draw(batch_size, _TEST_SEED + start) for start in range(0, count, batch_size)]
    device = next(model.parameters()).device
    norms: list[list[torch.Tensor]] = []
    attentions: list[list[torch.Tensor]] = []
    lost = []
    for batch in drawn:
        with capture(model.backbone) as trace:
            predictions = model(batch.pixel_values.to(device))
        tiles = batch.kinds.shape[1]
        targets, weights = batch.targets.to(device), batch.weights.to(device)
        if held_out is None:
            lost.append(float(weighted_error(predictions[:, -tiles:], targets, weights, (-1, -2))))
        else:
            lost.append(held_out(model, batch))
        norms.append([hidden[:, -tiles:].norm(dim=-1).cpu() for hidden in trace.hidden_states])
        attentions.append([maps.mean(1)[:, :, -tiles:].cpu() for maps in trace.attentions])
    background = torch.cat([batch.is_background for batch in drawn])
    rows: dict[str, list[Any]] = {"ratio": [], "outliers": [], "on_background": [], "attention": []}
    for index, parts in enumerate(zip(*norms, strict=True)):
        norm = torch.cat(parts)
        summary = summarise_norms(norm)
        outliers = norm > summary.factor * summary.median
        rows["ratio"].append(round(summary.largest, 3))
        rows["outliers"].append(summary.share)
        rows["on_background"].append(float(background[outliers].float().mean()) if outliers.any() else None)
        if index < len(attentions[0]):
            maps = torch.cat([batch[index] for batch in attentions])
            given = (maps * outliers[:, None]).sum(-1)  # by every query, those before the patches included
            others = torch.ones_like(given, dtype=torch.bool)
            others[:, -outliers.shape[1] :] = ~outliers
            rows["attention"].append(round(float(given[others].mean()), 4))
    return {"loss": sum(lost) / len(lost), **rows}
