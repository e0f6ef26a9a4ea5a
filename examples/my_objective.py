r"""An objective of one's own, chosen by name beside the package's: patch norms are drawn to their image's median.

    python examples/my_objective.py --objective even_norms --power 1 --preserve 1.0 \
        --model-name-or-path facebook/dinov2-small --train-dir photos --output-dir registers
    accelerate launch --num_processes 8 examples/my_objective.py --objective even_norms ...

All other flags are those of ``register-adapter train``. A loss that does not compare tokens with what the frozen base
says is an ``Objective``, with ``loss(model, batch)`` and ``evaluate(model, batch)``.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch

from register_adapter.train import main
from register_adapter.training import OBJECTIVES, Term


class EvenNorms(Term):
    """``|log(norm / median of the base's norms)| ** power``, averaged over the patches of an image."""

    name = "even_norms"  # as in --objective, and added to another: --objective distillation --even-norms 0.1

    def __init__(self, power: float = 2.0) -> None:
        self.power = power

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Its own flags; they are there only where it is chosen or added."""
        parser.add_argument("--power", type=float, default=2.0, help="Power of the deviation, default 2.")

    @classmethod
    def from_arguments(cls, arguments: Namespace, labels: Sequence[str]) -> "EvenNorms":
        """The objective of the parsed flags, and of the names of classes where there are labels."""
        return cls(arguments.power)

    def targets(self, teacher: Any) -> dict[str, torch.Tensor]:
        """What is asked of the frozen base, without gradients; --target-store keeps it. ``(B, 1)`` here."""
        norms = teacher.tokens.before_norm.float().norm(dim=-1)
        return {"median": norms.median(1, keepdim=True).values}

    def measure(self, model: Any, student: Any, targets: Any, batch: Any) -> torch.Tensor:
        """One value an image, ``(B,)``: the loss is its mean."""
        norms = student.before_norm.float().norm(dim=-1)
        return (norms / targets["median"].to(norms.device)).log().abs().pow(self.power).mean(1)

    def details(self) -> dict[str, Any]:
        """For results.json; a run is resumed only with the same."""
        return {"name": self.name, "power": self.power}


OBJECTIVES[EvenNorms.name] = EvenNorms

if __name__ == "__main__":
    main(prog=__file__)
