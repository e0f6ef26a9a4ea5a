"""The arms of the repair benchmark: what is put on a planted model, what of it moves, and towards what."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from repair_models import Case
from repair_recipe import IMAGES, RATE, STEPS, HardPatches, linear_behind

from register_adapter import add_registers, find_tower, fit_test_time_registers
from register_adapter.neurons import start_from
from register_adapter.testbed import LABELS
from register_adapter.training import (
    ClassificationObjective,
    DistillationObjective,
    NormObjective,
    Objective,
    PreservationObjective,
    RefinementObjective,
    SmoothObjective,
    TrainArguments,
    WeightedTerms,
    train,
    wrap,
)
from register_adapter.tuner.config import RegisterConfig
from register_adapter.tuner.layer import require_register_layer

__all__ = ["ARMS", "Arm"]

#: Images that registers are fitted on at test time.
FIT_IMAGES = 192
#: Name of an objective to what makes it.
OBJECTIVES: dict[str, Callable[[int], Objective]] = {
    "classification": lambda seed: ClassificationObjective(LABELS, freeze_head=True),
    "distillation": lambda seed: DistillationObjective(num_views=4, seed=seed),
    "refine": lambda seed: RefinementObjective(),
    "smooth": lambda seed: SmoothObjective(),
    "norm+preserve": lambda seed: WeightedTerms([(NormObjective(), 1.0), (PreservationObjective(), 1.0)]),
}
#: What moves: arguments of ``wrap``, and the learning rate, chosen in trials on the shipped model with images that are
#: in no row. LoRA near the steep units of a planting broke there at 5e-4.
MOVES: dict[str, tuple[dict[str, Any], float]] = {
    "registers": ({"num_registers": 4}, 2e-2),
    "deep registers": ({"num_registers": 4, "deep": True}, 2e-2),
    "LoRA alone": ({"train": "lora"}, 3e-4),
    "registers + LoRA": ({"num_registers": 4, "train": "registers+lora"}, 3e-4),
    "key/value registers": ({"num_registers": 4, "key_value": True}, 2e-2),
    "registers + gates": ({"num_registers": 4, "train": "registers+gates"}, 2e-2),
    "registers + last 2 blocks": ({"num_registers": 4, "train": "registers+last_blocks=2"}, 3e-4),
}
#: Those that every objective is crossed with.
CROSSED = ("registers", "deep registers", "LoRA alone", "registers + LoRA")


@dataclass(frozen=True)
class Arm:
    """One line of the table.

    Attributes:
        name: What it is called.
        make: Makes the model from the case, training images ``(N, 3, H, W)``, labels ``(N,)`` and the seed.
        trained: Whether anything is trained by gradients.
        labels: Whether labels are used.
        steps: Optimiser steps, where they are its own and not the benchmark's.
    """

    name: str
    make: Callable[[Case, torch.Tensor, torch.Tensor, int], Any]
    trained: bool = False
    labels: bool = False
    steps: int | None = None


class Items(torch.utils.data.Dataset[dict[str, Any]]):
    """Ready pixel values with their labels."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": int(self.labels[index]), "index": index}


def _fit(case: Case, pixels: torch.Tensor, **options: Any) -> Any:
    return fit_test_time_registers(
        case.base(), torch.split(pixels[:FIT_IMAGES], 32), num_registers=1, progress=False, **options
    )


def _zeroed(case: Case, pixels: torch.Tensor, labels: torch.Tensor, seed: int) -> Any:
    """The neurons that a fit finds write nothing any more, and there is no register."""
    fitted = _fit(case, pixels)
    units = dict(fitted.peft_config["default"].register_neurons)
    model = fitted.unload()
    with torch.no_grad():
        for block, members in units.items():
            find_tower(model).block_part(block, "mlp_out").weight[:, members] = 0
    return model


def _train(
    model: Any, objective: Objective, rate: float, pixels: torch.Tensor, labels: torch.Tensor, seed: int, **more: Any
) -> Any:
    settings = {"max_train_steps": len(pixels) // 16, "num_warmup_steps": 5, **more}
    args = TrainArguments(
        per_device_train_batch_size=16,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        seed=seed,
        use_cpu=next(model.parameters()).device.type == "cpu",
        quiet=True,
        **settings,
    )
    train(model, objective, Items(pixels, labels), args)
    return model


def _trained(objective: str, options: dict[str, Any], rate: float, fit: dict[str, Any] | None = None) -> Any:
    """What makes a trained arm; with ``fit``, from registers fitted at test time."""

    def make(case: Case, pixels: torch.Tensor, labels: torch.Tensor, seed: int) -> Any:
        aim = OBJECTIVES[objective](seed)
        if fit is None:
            return _train(wrap(case.base(), aim, **options), aim, rate, pixels, labels, seed)
        fitted = _fit(case, pixels, **fit)
        start = start_from(fitted)
        fitted.unload()
        model = wrap(case.base(), aim, **options, **start.options)
        (name,) = [name for name, config in model.peft_config.items() if isinstance(config, RegisterConfig)]
        start.fill(require_register_layer(model).tokens(name))
        return _train(model, aim, rate, pixels, labels, seed)

    return make


def _taught(options: dict[str, Any], rate: float, make_teacher: Callable[[Case, torch.Tensor], Any]) -> Any:
    """What makes an arm whose teacher is the base with an adapter that was fitted without training or labels."""

    def make(case: Case, pixels: torch.Tensor, labels: torch.Tensor, seed: int) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            make_teacher(case, pixels).save_pretrained(folder)
            aim = DistillationObjective(num_views=1, teacher=folder)
            return _train(wrap(case.base(), aim, **options), aim, rate, pixels, labels, seed)

    return make


def _hard(registers: int) -> Any:
    """What makes an arm of ``repair_recipe``, with so many registers."""

    def make(case: Case, pixels: torch.Tensor, labels: torch.Tensor, seed: int) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            teacher = TEACHERS["silenced teacher"](case, pixels)
            teacher.save_pretrained(f"{folder}/teacher")
            block = min(teacher.peft_config["default"].register_neurons)
            base, aim = case.base(), HardPatches(f"{folder}/teacher")
            options: dict[str, Any] = {"train": "lora", "lora": {"target_modules": linear_behind(base, block)}}
            if registers:
                options |= {"train": "registers+lora", "num_registers": registers, "insert_layer": block + 1}
            stored = {"target_store": f"{folder}/targets", "target_dtype": "float32", "cache_prefix": block}
            return _train(
                *(wrap(base, aim, **options), aim, RATE, pixels[:IMAGES], labels[:IMAGES], seed),
                max_train_steps=STEPS,
                num_warmup_steps=10,
                **stored,
            )

    return make


#: Name of a teacher to what fits it: the base whose artifacts go to a bias in the attention, or nowhere.
TEACHERS: dict[str, Callable[[Case, torch.Tensor], Any]] = {
    "fitted teacher": lambda case, pixels: _fit(case, pixels, attention_bias=True),
    "silenced teacher": lambda case, pixels: _fit(case, pixels, gate=-1e9),
}


def _arms() -> list[Arm]:
    arms = [
        Arm("planted model", lambda case, *_: case.base()),
        Arm("4 random registers", lambda case, *_: add_registers(case.base(), 4)),
        Arm("1 zero register", lambda case, *_: add_registers(case.base(), 1, init="zeros")),
        Arm("zeroed neurons", _zeroed),
        Arm("test-time register", lambda case, pixels, *_: _fit(case, pixels)),
        Arm("test-time attention bias", lambda case, pixels, *_: _fit(case, pixels, attention_bias=True)),
    ]
    for objective in OBJECTIVES:
        for moves, (options, rate) in MOVES.items():
            if moves in CROSSED or objective == "smooth":
                made = _trained(objective, options, rate)
                arms.append(Arm(f"{objective}: {moves}", made, True, objective == "classification"))
    for teacher, make_teacher in TEACHERS.items():
        arms += [Arm(f"{teacher}: {moves}", _taught(*MOVES[moves], make_teacher), True) for moves in CROSSED]
    arms += [
        Arm("silenced teacher, hard patches: LoRA alone behind", _hard(0), True, steps=STEPS),
        Arm("silenced teacher, hard patches: registers + LoRA behind", _hard(4), True, steps=STEPS),
    ]
    for objective, form, fit in (
        ("classification", "register", {}),
        ("classification", "attention bias", {"attention_bias": True}),
        ("smooth", "register", {}),
    ):
        made = _trained(objective, {}, 5e-3, fit)
        arms.append(Arm(f"{objective}: from the test-time {form}", made, True, objective == "classification"))
    return arms


ARMS = _arms()
