"""What a grown model learns of the images: what tiles hold and ask for, or less: objectives without any answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .growth import Ensemble, losses, weighted_error
from .mosaics import Mosaics, normalised
from .recipes import GrownModel

__all__ = ["OBJECTIVES", "DistilledViews", "HiddenTiles", "Objective", "objective_of"]


class Objective(nn.Module):
    """The weighted error of what is said of each tile; the others change what is computed from a batch.

    Args:
        ensemble: The models that learn.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.recipe = ensemble.recipe

    def forward(self, ensemble: Ensemble, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of each model ``(E,)`` on a batch of :class:`.growth.Drawn`."""
        predictions = ensemble(normalised(batch["images"]))
        return losses(predictions, batch["targets"], batch["weights"], self.recipe)

    def follow(self, ensemble: Ensemble) -> None:
        """What is to be done after a step."""

    @property
    def held_out(self) -> Callable[[GrownModel, Mosaics], float] | None:
        """Loss of one model on a batch of held-out images, lower is better; ``None`` for that of :func:`.measure`."""
        return None


class HiddenTiles(Objective):
    """MAE-like: the backbone sees some of the tiles; one block more says what the hidden ones hold."""

    def forward(self, ensemble: Ensemble, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of each model ``(E,)`` at the hidden tiles; which these are is drawn anew for every image."""
        order = _chosen(batch["numbers"], *batch["weights"].shape[1:]).argsort(-1)
        return self._error(ensemble(normalised(batch["images"]), order), batch["targets"], order)

    def _error(self, predictions: torch.Tensor, targets: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        visible = max(1, round((1 - self.recipe.masked) * order.shape[-1]))
        hidden = (order.argsort(-1) >= visible).float()
        return weighted_error(predictions, targets[..., : predictions.shape[-1]], hidden, (-1, -2))

    @property
    def held_out(self) -> Callable[[GrownModel, Mosaics], float]:
        """The error at hidden tiles."""

        def error(model: GrownModel, batch: Mosaics) -> float:
            device = next(model.parameters()).device
            order = _chosen(torch.zeros(1, device=device), *batch.weights.shape)[0].argsort(-1)
            predictions = model(batch.pixel_values.to(device), order)
            return float(self._error(predictions, batch.targets.to(device), order))

        return error


class DistilledViews(Objective):
    """DINO-like: from one view of an image a student says what its own average says of another view.

    What a model says of an image is that of CLS if it has one, else the mean of its patch tokens. The average's answers
    are centred and sharpened; views are crops, mirrored or not, with other colours.

    Args:
        ensemble: The students.
    """

    #: Share of the average and of the centre that stays at a step, and what answers are divided by.
    decay, centre_decay, student, teacher = 0.99, 0.9, 0.1, 0.04

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__(ensemble)
        for index, value in enumerate(ensemble.stacked):
            self.register_buffer(f"average_{index}", value.detach().clone())
        outputs = dict(zip(ensemble.names, ensemble.stacked, strict=True))["head.bias"].shape[-1]
        self.register_buffer("centre", torch.zeros(len(ensemble.seeds), 1, outputs))
        self.centre: torch.Tensor

    def forward(self, ensemble: Ensemble, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy of each student ``(E,)``, the mean of both directions."""
        views = _views(normalised(batch["images"]), batch["numbers"])
        said = [self._of_image(ensemble(view)) / self.student for view in views]
        with torch.no_grad():
            averages = [self.get_buffer(f"average_{index}") for index in range(len(ensemble.names))]
            wanted = [self._of_image(ensemble.predict(averages, view)) for view in views]
            centred = [((answer - self.centre) / self.teacher).softmax(-1) for answer in wanted]
            mean = torch.cat(wanted, 1).mean(1, keepdim=True)
            self.centre.lerp_(mean, 1 - self.centre_decay)
        pairs = zip(said, reversed(centred), strict=True)
        crossed = [(target * answer.log_softmax(-1)).sum(-1).mean(-1) for answer, target in pairs]
        return -torch.stack(crossed).mean(0)

    @torch.no_grad()
    def follow(self, ensemble: Ensemble) -> None:
        """Move the averages a little towards the students."""
        for index, value in enumerate(ensemble.stacked):
            self.get_buffer(f"average_{index}").lerp_(value, 1 - self.decay)

    def _of_image(self, predictions: torch.Tensor) -> torch.Tensor:
        answers = predictions[..., 0, :] if self.recipe.cls else predictions.mean(-2)
        # of one length, as the cosines of DINO's last layer; small answers would be even ones, and stay so
        length: float = answers.shape[-1] ** 0.5 / 8
        return nn.functional.normalize(answers, dim=-1) * length

    @property
    def held_out(self) -> Callable[[GrownModel, Mosaics], float]:
        """Share of the images whose other view is not the nearest of all."""

        def missed(model: GrownModel, batch: Mosaics) -> float:
            device = next(model.parameters()).device
            views = _views(batch.pixel_values.to(device)[None], torch.zeros(1, device=device))
            first, second = (nn.functional.normalize(self._of_image(model(view[0])), dim=-1) for view in views)
            nearest = (first @ second.T).argmax(1)
            return float((nearest != torch.arange(len(nearest), device=device)).float().mean())

        return missed


def _chosen(numbers: torch.Tensor, *shape: int) -> torch.Tensor:
    """Numbers from 0…1 ``(E, *shape)``, each part from its own seed of ``numbers`` ``(E,)``."""
    drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(int(number))) for number in numbers.tolist()]
    return torch.stack(drawn).to(numbers.device)


def _views(pixel_values: torch.Tensor, numbers: torch.Tensor) -> list[torch.Tensor]:
    """Two random crops of each image ``(E, B, 3, H, W)``, mirrored or not, with other colours."""
    flat = pixel_values.flatten(0, 1)
    views = []
    for chosen in _chosen(numbers, 2, pixel_values.shape[1], 10).unbind(1):
        scale, mirror, across, down, *colours = chosen.flatten(0, 1).T
        scale, none = (0.5 + 0.5 * scale).sqrt(), torch.zeros_like(scale)
        left, top = ((1 - scale) * (2 * place - 1) for place in (across, down))
        theta = torch.stack([scale * (2 * mirror.round() - 1), none, left, none, scale, top], 1).reshape(-1, 2, 3)
        grid = nn.functional.affine_grid(theta, list(flat.shape), align_corners=False)
        view = nn.functional.grid_sample(flat, grid, padding_mode="border", align_corners=False)
        gain, shift = (2 * torch.stack(colours, 1) - 1)[:, :, None, None].chunk(2, 1)
        views.append((view * (1 + 0.1 * gain) + 0.05 * shift).view_as(pixel_values))
    return views


#: Objectives by the name that a recipe has.
OBJECTIVES: dict[str, type[Objective]] = {"targets": Objective, "mae": HiddenTiles, "dino": DistilledViews}


def objective_of(ensemble: Ensemble) -> Objective:
    """The objective of an ensemble's recipe.

    Raises:
        ValueError: There is none of this name.
    """
    name = ensemble.recipe.objective
    if name not in OBJECTIVES:
        raise ValueError(f"objective={name!r:.100} is unknown; there are {', '.join(map(repr, OBJECTIVES))}")
    return OBJECTIVES[name](ensemble).to(ensemble.stacked[0].device)
