"""A recipe that is meant to hold over seeds: more weight on the artifacts, and LoRA where nothing is steep.

An artifact neuron turns a small change of what comes into its MLP into a large one of what it writes, so that LoRA in
front of it makes training jump. Here nothing moves before the MLP in which the fit found neurons: LoRA is on that MLP
and on every linear layer of the blocks behind, and registers, where there are any, enter behind it. The loss of
``distillation`` is taken behind the final norm, which hides how large a token is, and is a mean over patches, of which
a few in a hundred are artifacts; two more terms look at both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from register_adapter import find_tower
from register_adapter.training import DistillationObjective
from register_adapter.training.objectives.base import Batch
from register_adapter.training.objectives.terms import Targets, Teacher
from register_adapter.training.objectives.tokens import Tokens

__all__ = ["IMAGES", "RATE", "STEPS", "HardPatches", "linear_behind"]

#: Training images, whose targets and sequences before the block are computed once; steps of 16; peak learning rate.
#: Chosen on the images of seeds 10 to 12, which are in no row.
IMAGES, STEPS, RATE = 800, 160, 8e-3


class HardPatches(DistillationObjective):
    """Distillation from an adapter, plus two terms on patch tokens before the final norm.

    The squared error over the teacher's squared norm, mean over patches; and ``1 - cosine`` of the worst patches.

    Args:
        teacher: Folder of the teacher's adapter.
        worst: Number of patches of each image that the last term is the mean of.
    """

    name = "hard_patches"

    def __init__(self, teacher: str, worst: int = 3) -> None:
        super().__init__(num_views=1, teacher=teacher)
        self.worst = worst

    def targets(self, teacher: Teacher) -> dict[str, torch.Tensor]:
        """As for distillation, and ``raw`` ``(B, P, D)``, the patch tokens before the final norm."""
        return {**super().targets(teacher), "raw": self._tokens(teacher).before_norm}

    def measure(self, model: nn.Module, student: Tokens, targets: Targets, batch: Batch) -> torch.Tensor:
        """The sum of the three for each image, ``(B,)``."""
        given = student.before_norm.float()
        wanted = targets["raw"].to(given)
        error = (given - wanted).square().sum(-1) / wanted.square().sum(-1)
        angle = 1 - F.cosine_similarity(given, wanted, dim=-1)
        hard = angle.topk(self.worst, 1).values.mean(1)
        return super().measure(model, student, targets, batch) + error.mean(1) + hard

    def details(self) -> dict[str, Any]:
        """As for distillation, and the number of worst patches."""
        return {**super().details(), "worst": self.worst}


def linear_behind(model: nn.Module, block: int) -> list[str]:
    """Names of the linear layers of a block's MLP, and of every block behind it."""
    tower = find_tower(model)
    parts = [tower.block_part(block, name) for name in ("mlp_in", "mlp_up", "mlp_out")]
    behind = tower.part("blocks")[block + 1 :].modules()
    chosen = {id(part) for part in [*parts, *behind] if isinstance(part, nn.Linear)}
    return [name for name, part in model.named_modules() if id(part) in chosen]
