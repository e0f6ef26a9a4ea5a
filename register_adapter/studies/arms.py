"""The arms of a study, one row each: what is put on the base, what of it is trained, and the command that does it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from ..data.datasets import PixelBatches
from ..neurons import fit_test_time_registers
from ..towers.tower import find_tower
from ..training import (
    Callback,
    DistillationObjective,
    NormObjective,
    Objective,
    SmoothObjective,
    TrainArguments,
    WeightedTerms,
    train,
    wrap,
)
from ..tuner.hooks.attention import reads_implementation
from ..tuner.peft_model import add_registers
from .images import Part

__all__ = ["ARMS", "BATCH", "TEACHER", "Arm", "Bench"]

#: Images of an optimiser step, and steps of warm-up.
BATCH, _WARM_UP = 16, 5
#: Weight of the term on norms beside smoothed targets, which alone leave the outliers of some seeds.
_NORM = 1.0
#: A forward and a backward pass of the student and a pass of the base, in forward passes.
_PASSES = 4
#: Name of the arm whose adapter teaches others.
TEACHER = "fit: hidden register"
_Kind = Literal["base", "control", "fit", "train"]


@dataclass
class Bench:
    """What arms are made with.

    Attributes:
        base: The model; every arm has a copy of it.
        part: The images that arms are made with.
        image_processor: Of the model.
        steps: Optimiser steps.
        rule: The audit's rule for outliers.
        batch_size: Images in a pass without gradients.
        teacher: Folder of the adapter that teaches, where one has been fitted.
        tick: Called with numbers of images as the work goes on.
    """

    base: nn.Module
    part: Part
    image_processor: Any
    steps: int
    rule: str
    batch_size: int
    teacher: Path
    tick: Callable[[int], None]

    @property
    def batches(self) -> PixelBatches:
        """The images in batches."""
        return self.part.batches(self.batch_size)


@dataclass(frozen=True)
class Arm:
    """One line of the table.

    Attributes:
        name: What it is called.
        does: What to do, as a recommendation says it; empty for what is not recommended.
        kind: Whether it is the base, a control, a fit, or trained.
        options: Of ``add_registers``, of the fit, or of what moves in a training.
        objective: What is trained on: the name of its flag.
        learning_rate: Peak.
        seeded: Whether it depends on the seed.
        after: Name of the arm whose adapter it needs.
    """

    name: str
    does: str = ""
    kind: _Kind = "control"
    options: Mapping[str, Any] = field(default_factory=dict)
    objective: str | None = None
    learning_rate: float = 0.0
    seeded: bool = True
    after: str | None = None

    @property
    def slug(self) -> str:
        """Name of its folder."""
        words = "".join(letter if letter.isalnum() else " " for letter in self.name.lower()).split()
        return "-".join(words)

    @property
    def recommended(self) -> bool:
        """Whether it can be."""
        return bool(self.does)

    def fits(self, base: nn.Module) -> bool:
        """Whether the model can have it."""
        needs = {"attention_bias", "gate"} & set(self.options) or self.after is not None
        return not needs or reads_implementation(find_tower(base))

    def cost(self, bench: Bench) -> int:
        """How long it takes, about, in forward passes of one image."""
        if self.objective is not None:
            return _PASSES * BATCH * bench.steps
        return 3 * len(bench.part) if self.kind == "fit" else 0

    def make(self, bench: Bench, seed: int) -> nn.Module:
        """The model, in ``eval()`` mode, on a copy of the base.

        Raises:
            NoArtifactsError: The fit, or the objective, sees no outliers in these images.
            RegisterAdapterError: As for those.
        """
        base = copy.deepcopy(bench.base)
        device = next(base.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return self._made(base, bench, seed).eval()

    def _made(self, base: nn.Module, bench: Bench, seed: int) -> nn.Module:
        if self.kind == "base":
            return base
        if self.objective is not None:
            return self._trained(base, bench, seed)
        if self.kind == "control":
            with warnings.catch_warnings():  # of zeros, which nothing trains here
                warnings.simplefilter("ignore")
                return add_registers(base, **self.options)
        images = list(bench.batches)
        fitted = fit_test_time_registers(base, images, rule=bench.rule, progress=False, **self.options)
        bench.tick(self.cost(bench))
        return fitted

    def _trained(self, base: nn.Module, bench: Bench, seed: int) -> nn.Module:
        assert self.objective is not None
        objective = _OBJECTIVES[self.objective](bench)
        model: Any = wrap(base, objective, **self.options)
        on_cpu = next(base.parameters()).device.type == "cpu"
        arguments = TrainArguments(**self._settings(bench.steps, seed), quiet=True, use_cpu=on_cpu)
        train(
            *(model, objective, bench.part.data, arguments),
            image_processor=bench.image_processor,
            callbacks=[_Ticks(bench)],
        )
        return cast(nn.Module, model)

    def _settings(self, steps: int, seed: int) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": BATCH,
            "max_train_steps": steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine",
            "num_warmup_steps": min(_WARM_UP, steps // 5),
            "seed": seed,
        }

    def command(self, model: str, images: str, *, steps: int, seed: int, rule: str, teacher: str) -> list[str]:
        """The words of the command that makes such an adapter from all of the images.

        Args:
            model: Name of the model.
            images: Folder of images, or a word for drawn ones if nothing is trained.
            steps: Optimiser steps.
            seed: Of the training.
            rule: The audit's rule.
            teacher: Folder of the adapter that teaches.
        """
        ruled = [] if rule == "auto" else ["--rule", rule]
        if self.objective is None:
            return ["register-adapter", "fit", model, images, *_flags(self.options), *ruled, "--out", "repaired"]
        words = ["register-adapter", "train", "--model-name-or-path", model, "--train-dir", images]
        words += ["--objective", self.objective, *_flags(self.options)]
        aim = {"num_views": 1, "teacher": teacher} if self.after is not None else {"norm": _NORM}
        words += [*_flags(aim), *([] if self.after is not None else ruled), *_flags(self._settings(steps, seed))]
        return [*words, "--output-dir", "repaired"]


class _Ticks(Callback):
    """Moves the bar at every step."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def on_step_end(self, model: nn.Module) -> None:
        """Called after every optimiser step."""
        self.bench.tick(_PASSES * BATCH)


_OBJECTIVES: dict[str, Callable[[Bench], Objective]] = {
    "smooth": lambda bench: WeightedTerms([(SmoothObjective(rule=bench.rule), 1.0), (NormObjective(), _NORM)]),
    "distillation": lambda bench: DistillationObjective(num_views=1, teacher=str(bench.teacher)),
}


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Arguments of Python as flags of a command."""
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [_word(value)])]
    return words


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_FOUR, _BOTH, _LORA = {"num_registers": 4}, {"train": "registers+lora", "num_registers": 4}, {"train": "lora"}
#: In the order of what they cost; what teaches stands before what is taught.
ARMS = (
    Arm("as it is", kind="base", seeded=False),
    Arm("1 random register", options={"num_registers": 1}),
    Arm("4 random registers", options=_FOUR),
    Arm("1 zero register", options={"num_registers": 1, "init": "zeros"}, seeded=False),
    Arm("fit: 1 register", "fit 1 register", "fit", seeded=False),
    Arm(
        "fit: attention bias",
        "fit 1 register as an attention bias",
        "fit",
        {"attention_bias": True},
        seeded=False,
    ),
    Arm(TEACHER, "fit 1 register and hide it", "fit", {"gate": -1e9}, seeded=False),
    Arm("train: 4 registers", "train 4 registers", "train", _FOUR, "smooth", 2e-2),
    Arm("train: 4 registers + LoRA", "train 4 registers with LoRA", "train", _BOTH, "smooth", 1e-3),
    Arm("train: LoRA alone", options=_LORA, objective="smooth", learning_rate=1e-3),
    Arm(
        "teach: 4 registers + LoRA",
        "train 4 registers with LoRA towards the model with the hidden register",
        "train",
        _BOTH,
        "distillation",
        3e-4,
        after=TEACHER,
    ),
    Arm("teach: LoRA alone", "", "control", _LORA, "distillation", 3e-4, after=TEACHER),
)
