"""The knobs of a training run, with the names of transformers' no-trainer scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

__all__ = ["TrainArguments"]

#: transformers' schedules that need nothing but the number of steps.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)

#: How targets can be stored.
DTYPES = ("bfloat16", "float16", "float32", "int8")


def _knob(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainArguments:
    """How to train; every value is checked on construction.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range; the message names it, what was found and what is allowed.
    """

    output_dir: str | None = _knob(None, "Folder for the adapter, checkpoints, logs and results.json.")
    per_device_train_batch_size: int = _knob(8, "Images per process and step.")
    per_device_eval_batch_size: int = _knob(8, "Images per process in the evaluation.")
    gradient_accumulation_steps: int = _knob(1, "Batches per optimiser step.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _knob(
        None, "Autocast to fp16 or bf16; by default what `accelerate launch` says."
    )
    learning_rate: float = _knob(1e-3, "Peak learning rate of AdamW.")
    weight_decay: float = _knob(0.0, "Weight decay of matrices; registers, biases and norms are exempt.")
    max_grad_norm: float | None = _knob(1.0, "Clip the gradient's norm; 0 does not clip.")
    lr_scheduler_type: str = _knob("linear", "Name of a transformers schedule, such as linear, cosine, constant.")
    num_warmup_steps: int = _knob(0, "Optimiser steps of linear warm-up.")
    num_train_epochs: int = _knob(3, "Passes over the training set.")
    max_train_steps: int | None = _knob(None, "Optimiser steps; overrides the number of epochs.")
    seed: int = _knob(0, "Seed of initial values, order of the data and dropout.")
    dataloader_num_workers: int = _knob(0, "Processes that read images; 0 reads in the training process.")
    checkpointing_steps: int | str | None = _knob(None, "Checkpoint every so many optimiser steps, or each 'epoch'.")
    resume_from_checkpoint: str | None = _knob(
        None, "A checkpoint's folder, or 'latest' (starts anew if there is none)."
    )
    checkpoints_total_limit: int | None = _knob(None, "Keep this many checkpoints, the newest.")
    overwrite_output_dir: bool = _knob(False, "Write over an earlier run in output_dir; its checkpoints are deleted.")
    eval_steps: int | str | None = _knob(
        None, "Evaluate every so many optimiser steps and after each epoch, or 'epoch' for the latter alone."
    )
    load_best_model_at_end: bool = _knob(False, "Save the adapter of the best evaluation, not the last one.")
    metric_for_best_model: str = _knob("loss", "What is best: a metric of the evaluation, such as loss or accuracy.")
    greater_is_better: bool | None = _knob(
        None, "Whether more of that metric is better; by default it is, but for a loss."
    )
    early_stopping_patience: int | None = _knob(None, "Stop after this many evaluations in a row without a new best.")
    target_store: str | None = _knob(
        None, "Folder for what the frozen base says of every training image, computed once; used again if it is there."
    )
    target_dtype: str = _knob("bfloat16", "How it is stored: bfloat16, float16, float32 or int8.")
    ema_decay: float | None = _knob(
        None, "Evaluate and save an exponential moving average of what is trained, such as 0.999; by default none."
    )
    cache_prefix: int | None = _knob(
        None, "Store the sequence that comes into this block too, and begin there: give --insert-layer the same number."
    )
    torch_compile: bool = _knob(False, "Compile the blocks of the tower, which takes a while at the start.")
    torch_compile_backend: str | None = _knob(None, "Backend for that; default inductor. Implies --torch-compile.")
    gradient_checkpointing: bool = _knob(False, "Compute blocks again in the backward pass: less memory, more time.")
    logging_steps: int = _knob(10, "Optimiser steps between two values of the loss.")
    with_tracking: bool = _knob(False, "Log to an experiment tracker.")
    audit_images: int = _knob(
        32, "With a tracker: audit so many evaluation images at every evaluation, and draw two; 0 for none."
    )
    report_to: str = _knob("all", "Which tracker: tensorboard, wandb, ..., or all that are installed.")
    quiet: bool = _knob(False, "Show neither progress nor messages that are not warnings.")
    use_cpu: bool = _knob(False, "Train on the CPU even where there is a GPU.")
    push_to_hub: bool = _knob(False, "Upload the adapter to the Hub after training.")
    hub_model_id: str | None = _knob(None, "Repository on the Hub, user/name.")
    hub_private: bool | None = _knob(None, "Make a new repository private.")

    def __post_init__(self) -> None:
        for name in ("checkpointing_steps", "eval_steps"):
            steps = getattr(self, name)
            if isinstance(steps, str) and steps != "epoch":
                if not steps.isdecimal():
                    raise ValueError(f"{name} must be a number of steps or 'epoch', got {steps!r}")
                setattr(self, name, int(steps))
            if steps != "epoch":
                self._check(name, int, 1, optional=True)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            self._check(name, int, 1)
        for name in ("num_train_epochs", "logging_steps"):
            self._check(name, int, 1)
        for name in ("max_train_steps", "checkpoints_total_limit", "early_stopping_patience"):
            self._check(name, int, 1, optional=True)
        for name in ("num_warmup_steps", "seed", "dataloader_num_workers", "audit_images"):
            self._check(name, int, 0)
        for name in ("learning_rate", "weight_decay"):
            self._check(name, (int, float), 0)
        self._check("max_grad_norm", (int, float), 0, optional=True)
        self._check("ema_decay", (int, float), 0, optional=True)
        if self.ema_decay is not None and self.ema_decay >= 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        if self.learning_rate == 0:
            raise ValueError("learning_rate must be above 0, got 0")
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(f"lr_scheduler_type must be one of {', '.join(SCHEDULES)}, got {self.lr_scheduler_type!r}")
        if self.mixed_precision not in (None, "no", "fp16", "bf16"):
            raise ValueError(f"mixed_precision must be no, fp16 or bf16, got {self.mixed_precision!r}")
        if self.target_store == "":
            raise ValueError("target_store must name a folder, got ''")
        if self.target_dtype not in DTYPES:
            raise ValueError(f"target_dtype must be one of {', '.join(DTYPES)}, got {self.target_dtype!r}")
        self._check("cache_prefix", int, 1, optional=True)
        if self.cache_prefix is not None and self.target_store is None:
            raise ValueError("cache_prefix needs target_store, the folder where the sequences go, too")
        if self.torch_compile_backend is not None:
            self.torch_compile = True
            backends = torch.compiler.list_backends(exclude_tags=())
            if self.torch_compile_backend not in backends:
                known = ", ".join(backends)
                raise ValueError(f"torch_compile_backend must be one of {known}, got {self.torch_compile_backend!r}")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id, the repository to upload to, such as user/name")
        for name in ("checkpointing_steps", "resume_from_checkpoint", "with_tracking", "push_to_hub"):
            if getattr(self, name) and self.output_dir is None:
                raise ValueError(f"{name} needs an output_dir to write to")

    @property
    def evaluates_every(self) -> int | str | None:
        """``eval_steps``, or ``"epoch"`` where the best model or an early stop is wanted without it."""
        selects = self.load_best_model_at_end or self.early_stopping_patience is not None
        return self.eval_steps or ("epoch" if selects else None)

    def _check(self, name: str, kind: Any, least: float, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = "an integer" if kind is int else "a number"
            raise TypeError(f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}")
        if not least <= value < math.inf:  # NaN is refused too
            finite = "" if kind is int else "a finite number of "
            raise ValueError(f"{name} must be {finite}at least {least}, got {value}")
        if kind is int and value >= 2**32:  # NumPy's limit of a seed; counts beyond it overflow in torch
            raise ValueError(f"{name} must be below 2 ** 32, got {value}")
