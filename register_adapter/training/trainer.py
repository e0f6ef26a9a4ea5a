"""Training registers with Accelerate: set-up, the run, the evaluation, and what is saved at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import get_scheduler

from ..tuner.card_text import OFF
from ..tuner.layer import find_register_layer
from ..tuner.peft_model import RegisterPeftModel
from ..utils.environment import git_commit, hardware, versions
from ..utils.staging import check_writable
from . import checkpoints
from .arguments import TrainArguments
from .checkpoints import TrainState
from .loop import Loop, evaluate, number_of_steps
from .objectives import Objective
from .saving import check_finite, describe_run, push_run, save_run
from .setup import (
    image_processor_for,
    make_accelerator,
    parameter_groups,
    processed,
    run_settings,
    shard_by_block,
)

__all__ = ["check_output_dir", "train"]

logger = logging.getLogger(__name__)


def train(
    model: RegisterPeftModel,
    objective: Objective,
    train_dataset: Any,
    args: TrainArguments,
    eval_dataset: Any = None,
    *,
    image_processor: Any = None,
    training_data: str | None = None,
    evaluation_data: str | None = None,
    details: dict[str, Any] | None = None,
    hub_token: str | None = None,
) -> dict[str, Any]:
    """Train what of ``model`` needs gradients: registers, and ``modules_to_save``.

    The model is trained in place and left in ``eval()`` mode on the training device. With ``args.output_dir`` the
    adapter, its card, the image processor and ``results.json`` are saved there.

    Args:
        model: A model with registers, from ``add_registers`` or ``objective.wrap``.
        objective: What to train on.
        train_dataset: A map-style data set: items ``{"image": image, "label": int}``, or, ready for the model,
            ``{"pixel_values": (3, H, W) float, "labels": int}``. Random augmentation is the same after a resumption
            only if it depends on nothing but the item's number.
        args: The knobs.
        eval_dataset: The same for the evaluation at the end; ``None`` for none.
        image_processor: Turns images into pixel values; by default that of the base model's folder or repository.
        training_data: What the model card says about the data.
        evaluation_data: What it says about ``eval_dataset``; default the training data.
        details: More for ``results.json``.
        hub_token: Token for ``args.push_to_hub``; by default the one that huggingface_hub finds. Never logged.

    Returns:
        What ``results.json`` holds: ``metrics`` (``train_loss``, ``eval_...``, and ``eval_registers_off_...`` of the
        same model and head with its registers switched off), ``global_step``, ``seconds``,
        ``images_per_second``, ``trainable_parameters``, ``objective``, ``arguments``, ``versions``, ``hardware``…

    Raises:
        ValueError: Nothing can be trained, a data set is empty, or ``output_dir`` holds another run's checkpoints.
        CheckpointError: The checkpoint to resume from is missing, damaged, or of a run with other settings.
        MissingExtraError: The tracker is not installed.
        FloatingPointError: The loss, or what was trained, is not finite any more.
    """
    check_output_dir(args)
    accelerator = make_accelerator(args)
    set_seed(args.seed, device_specific=True)
    image_processor = image_processor or image_processor_for(model, train_dataset)
    train_data = processed(train_dataset, image_processor, "train_dataset")
    eval_data = processed(eval_dataset, image_processor, "eval_dataset") if eval_dataset is not None else None
    trainable = _trainable(model)
    settings = run_settings(args, accelerator, objective, trainable, len(train_data))
    state, checkpoint = _find_start(args, model, settings)
    loop = _prepare(accelerator, args, objective, model, trainable, train_data, state, checkpoint)
    _open_outputs(accelerator, args, resumed=checkpoint is not None)

    first_step = state.global_step
    metrics = loop.fit()
    if eval_data is not None:
        metrics |= _evaluate(loop, model, eval_data)
    results = {
        "metrics": metrics,
        "global_step": state.global_step,
        "resumed_from_step": first_step if checkpoint is not None else None,
        "seconds": round(loop.seconds, 3),
        "images_per_second": round(loop.images_per_second, 2),
        "train_samples": len(train_data),
        "eval_samples": len(eval_data) if eval_data is not None else 0,
        "trainable_parameters": sum(parameter.numel() for parameter in trainable.values()),
        "objective": objective.details(),
        "arguments": asdict(args),
        "versions": versions(),
        "hardware": hardware(accelerator),
        "git_commit": git_commit(),
        **(details or {}),
    }
    weights = checkpoints.adapter_weights(accelerator, loop.model)
    trained = accelerator.unwrap_model(loop.model, keep_fp32_wrapper=False)
    trained.eval()
    check_finite(weights or {name: parameter for name, parameter in trained.named_parameters() if name in trainable})
    if accelerator.is_main_process and args.output_dir:
        card = describe_run(results, args, training_data, evaluation_data)
        save_run(trained, weights, Path(args.output_dir), results, image_processor, card)
        if args.push_to_hub:
            push_run(trained, args, image_processor, card, hub_token)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def check_output_dir(args: TrainArguments) -> None:
    """Refuse a folder in which a run could not be told from an earlier one.

    Raises:
        ValueError: ``output_dir`` is a file, or holds checkpoints and the run neither resumes nor overwrites.
    """
    if args.output_dir is None:
        return
    if Path(args.output_dir).is_file():
        raise ValueError(f"output_dir {args.output_dir} is a file; name a folder")
    whole = checkpoints.find_all(args.output_dir)
    if whole and not args.resume_from_checkpoint and not args.overwrite_output_dir:
        raise ValueError(
            f"{args.output_dir} holds checkpoints of an earlier run ({', '.join(path.name for path in whole)}). Go on "
            "with --resume-from-checkpoint latest, choose another --output-dir, or delete them with "
            "--overwrite-output-dir"
        )


def _trainable(model: RegisterPeftModel) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("no parameter of the model needs a gradient; load the adapter with is_trainable=True")
    return trainable


def _find_start(
    args: TrainArguments, model: RegisterPeftModel, settings: dict[str, Any]
) -> tuple[TrainState, Path | None]:
    """The beginning, or the place of a checkpoint, whose adapter is loaded then; and the checkpoint."""
    if args.resume_from_checkpoint:
        checkpoint = checkpoints.find(args.resume_from_checkpoint, str(args.output_dir))
        if checkpoint is not None:
            state = checkpoints.read_state(checkpoint, settings)
            checkpoints.load_adapter(model, checkpoint)
            return state, checkpoint
        logger.warning("there is no checkpoint in %s yet; starting anew", args.output_dir)
    return TrainState(settings=settings), None


def _prepare(
    accelerator: Accelerator,
    args: TrainArguments,
    objective: Objective,
    model: RegisterPeftModel,
    trainable: Mapping[str, torch.nn.Parameter],
    train_data: Any,
    state: TrainState,
    checkpoint: Path | None,
) -> Loop:
    """Loader, optimiser, schedule and model as the loop runs them, with what a checkpoint holds of them."""
    generator = torch.Generator()
    loader = DataLoader(
        train_data,
        args.per_device_train_batch_size,
        shuffle=True,
        collate_fn=objective.collate,
        num_workers=args.dataloader_num_workers,
        generator=generator,
    )
    optimizer = torch.optim.AdamW(parameter_groups(trainable, args.weight_decay), lr=args.learning_rate)
    shard_by_block(accelerator, model)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # It counts optimiser steps whatever the number of processes, so it is not prepared.
    total_steps = number_of_steps(args, len(loader), accelerator.gradient_accumulation_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, total_steps)
    random_state = None
    if checkpoint is not None:
        random_state = checkpoints.load(checkpoint, accelerator, prepared, optimizer, scheduler)
    return Loop(
        accelerator,
        args,
        objective,
        prepared,
        optimizer,
        scheduler,
        loader,
        generator,
        state,
        total_steps,
        random_state,
    )


def _open_outputs(accelerator: Accelerator, args: TrainArguments, resumed: bool) -> None:
    """The output folder, cleared of an earlier run if that is wanted, and the trackers."""
    if accelerator.is_main_process and args.output_dir:
        check_writable(args.output_dir)
        if args.overwrite_output_dir and not resumed:
            checkpoints.remove_all(args.output_dir)
    accelerator.wait_for_everyone()
    if args.with_tracking:
        flat = {key: value for key, value in asdict(args).items() if isinstance(value, bool | int | float | str)}
        accelerator.init_trackers("register_adapter", flat)


def _evaluate(loop: Loop, model: RegisterPeftModel, eval_data: Any) -> dict[str, float]:
    """The objective's metrics on the evaluation set, with the registers and without; logged too."""
    accelerator, args, objective = loop.accelerator, loop.args, loop.objective
    loader = DataLoader(
        eval_data,
        args.per_device_eval_batch_size,
        collate_fn=objective.collate,
        num_workers=args.dataloader_num_workers,
    )
    loader = accelerator.prepare(loader)
    means = evaluate(accelerator, loop.model, objective, loader, progress=not args.quiet)
    metrics = {f"eval_{name}": value for name, value in means.items()}
    layer = find_register_layer(model)
    if layer is not None:  # what the head does alone, or its gain would read as the registers'
        with layer.set_aside():
            off = evaluate(accelerator, loop.model, objective, loader, progress=not args.quiet)
        metrics |= {f"{OFF}{name}": value for name, value in off.items()}
    accelerator.log(metrics, step=loop.state.global_step)
    return metrics
