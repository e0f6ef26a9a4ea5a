"""What to do next with a model after its audit: the command that repairs it, or to leave it as it is."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from ...artifacts.report import ArtifactReport
from .markup import Markup, element

__all__ = ["Origin", "next_step"]


@dataclass(frozen=True)
class Origin:
    """What an audit was made of, as its command line named it.

    Attributes:
        model: Name or folder of the base model.
        images: Folder of images.
        max_images: How many of them were used at most, ``None``: all.
    """

    model: str = "MODEL"
    images: str = "IMAGES"
    max_images: int | None = None

    def command(self, name: str, *options: str) -> str:
        """A command of ``register-adapter`` over the same model and images."""
        some = () if self.max_images is None else ("--max-images", str(self.max_images))
        return shlex.join(["register-adapter", name, self.model, self.images, *options, *some])

    def train_command(self) -> str:
        """A training without labels over the same model and images."""
        inputs = ("--model-name-or-path", self.model, "--train-dir", self.images)
        return shlex.join(
            ["register-adapter", "train", *inputs, "--objective", "distillation", "--output-dir", "registers"]
        )


def next_step(report: ArtifactReport, origin: Origin) -> Markup:
    """What to do with the model of a report.

    Args:
        report: What an audit found.
        origin: What it was made of.
    """
    rule = () if report.rule == "auto" else ("--rule", report.rule)
    return element("div", element("h4", "What to do next"), list(_steps(report, origin, rule)), class_="next")


def _steps(report: ArtifactReport, origin: Origin, rule: tuple[str, ...]) -> Iterator[Markup]:
    fit = origin.command("fit", "--out", "fitted", *rule)
    if report.unexplained:
        yield _say("Look at the attention maps, and audit by a rule that draws a line in any case:")
        yield _run(origin.command("audit", "--rule", "sigma"))
        yield _say("If the outliers there are what draws the attention, fit a register by the same rule:")
        yield _run(origin.command("fit", "--out", "fitted", "--rule", "sigma"))
    elif report.verdict == "none" and report.num_registers:
        yield _say("Leave it: with these registers it has no artifacts.")
    elif report.verdict == "none":
        yield _say("Leave it: it needs no registers.")
    elif report.evidence == "attention" and report.most_outlying is None:
        yield _say("Norms do not tell these patches from others, so no fit can find what writes them. Train registers:")
        yield _run(origin.train_command())
    else:
        left = "These registers leave artifacts. " if report.num_registers else ""
        yield _say(f"{left}Fit a register to the base, without training:")
        yield _run(fit)
        yield _say("Then look at the repaired model:")
        yield _run(origin.command("audit", "--adapter", "fitted", *rule))


def _say(words: str) -> Markup:
    return element("p", words)


def _run(command: str) -> Markup:
    return element("pre", element("code", command), tabindex=0)
