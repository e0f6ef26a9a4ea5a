"""Training registers with Accelerate: set-up, the run, the evaluation, and what is saved at the end."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import send_to_device, set_seed
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import get_scheduler

from ..data.streaming import StreamedBatches, StreamedDataset
from ..tuner.card_text import OFF
from ..tuner.layer import find_register_layer
from ..utils.environment import git_commit, hardware, versions
from ..utils.parameters import trainable_by_part, trained_parameters
from . import checkpoints
from .arguments import TrainArguments
from .block_modes import check_modes, modes_of_blocks
from .callbacks import AverageWeights, Callback, RunningMeans, WatchArtifacts
from .checkpoints import TrainState
from .interruption import Interrupted, Interruption, leave_signals_to_the_run
from .loop import Loop
from .objectives import Objective
from .objectives.stored import store_targets
from .run_lock import folder_lock_of_run
from .saving import check_output_dir, check_push, describe_run, open_outputs, push_run, save_trained, write_card
from .selection import Selection
from .setup import (
    check_alike,
    check_streamed,
    image_processor_for,
    make_accelerator,
    number_of,
    parameter_groups,
    processed,
    run_settings,
    shard_by_block,
)

__all__ = ["train"]

logger = logging.getLogger(__name__)


def train(
    model: PeftModel,
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
    run_config: str | None = None,
    interruption: Interruption | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train what of ``model`` needs gradients: registers, and what else was put on it to move.

    The model is trained in place and left in ``eval()`` mode on the training device. With ``args.output_dir`` the
    adapter, its card, the image processor and ``results.json`` are saved there.

    Args:
        model: A model with adapters, from :func:`wrap`, ``add_registers`` or ``compose``.
        objective: What to train on.
        train_dataset: A map-style data set: items ``{"image": image, "label": int}``, or, ready for the model,
            ``{"pixel_values": (3, H, W) float, "labels": int}``; labels only if the objective needs them. Random
            augmentation is the same after a resumption only if it depends on nothing but the item's number, and on the
            epoch that ``set_epoch`` is called with, if the data set has it; that of
            :class:`register_adapter.data.ProcessedDataset` does.
        args: The knobs.
        eval_dataset: The same for the evaluations, without augmentation; ``None`` for none.
        image_processor: Turns images into pixel values; by default that of the base model's folder or repository. A
            function from a PIL image to ``(3, H, W)``, such as a torchvision transform, is not saved with the adapter.
        training_data: What the model card says about the data.
        evaluation_data: What it says about ``eval_dataset``; default the training data.
        details: More for ``results.json``.
        hub_token: Token for ``args.push_to_hub``; by default the one that huggingface_hub finds. Never logged.
        run_config: The run's settings as text, for ``run.yaml`` in ``args.output_dir``.
        interruption: Listens for signals; with one, the run ends with a checkpoint. Default: Ctrl-C ends it at once.
        callbacks: What changes during the run, such as :class:`AnnealNeurons`.

    Returns:
        What ``results.json`` holds: ``metrics`` (``train_loss``, ``eval_...``, and ``eval_registers_off_...`` of the
        same model and head with its registers switched off), ``global_step``, ``seconds``,
        ``images_per_second``, ``evaluations`` on the way, the ``best`` one, ``resumed_from_checkpoint``,
        ``trainable_parameters`` and, by part, ``trained``, ``objective``, ``arguments``, ``versions``, ``hardware``…;
        and, which the file cannot say, ``pushed_to``, the address of what was uploaded.

    Raises:
        ValueError: Nothing can be trained, a data set is empty, or ``output_dir`` holds another run's result.
        FolderInUseError: Another run is writing into ``output_dir``.
        HubAccessError: ``push_to_hub``, and the repository cannot be written to; told before training.
        CheckpointError: The checkpoint to resume from is missing, damaged, or of a run with other settings.
        MissingExtraError: The tracker is not installed.
        FloatingPointError: The loss, or what was trained, is not finite any more.
        Interrupted: A signal came, and ``interruption`` listened.
    """
    accelerator = make_accelerator(args)
    callbacks = [*callbacks, *([AverageWeights(args.ema_decay)] if args.ema_decay is not None else [])]
    with folder_lock_of_run(str(args.output_dir), accelerator) if args.output_dir is not None else nullcontext():
        check_output_dir(args)
        check_push(args, hub_token)
        set_seed(args.seed, device_specific=True)
        image_processor = image_processor or image_processor_for(model, train_dataset)
        train_data = processed(train_dataset, image_processor, "train_dataset")
        eval_data = processed(eval_dataset, image_processor, "eval_dataset") if eval_dataset is not None else None
        trainable = _trainable(model)
        if isinstance(train_data, StreamedDataset):
            check_streamed(args)
        check_modes(model, args)
        objective.prepare(model, getattr(train_data, "head", train_data))
        if args.target_store is not None:
            model.to(accelerator.device)
            train_data = store_targets(
                *(objective, model, train_data, accelerator, image_processor),
                folder=args.target_store,
                dtype=args.target_dtype,
                prefix=args.cache_prefix,
                progress=not args.quiet,
            )
        loop = _prepare(
            *(accelerator, args, objective, model, trainable, train_data, eval_data, interruption, callbacks),
            image_processor,
        )
        resumed, first_step = loop.checkpoint, loop.state.global_step

        def known() -> dict[str, Any]:
            return {
                "global_step": loop.state.global_step,
                "train_samples": number_of(train_data),
                "eval_samples": len(eval_data) if eval_data is not None else 0,
                "trained": trainable_by_part(model),
                "objective": {**objective.details(), **_details(callbacks)},
                **(details or {}),
            }

        loop.write_card = lambda saved, folder: write_card(saved, folder, describe_run(known(), args, training_data))
        open_outputs(accelerator, args, resumed is not None, run_config, hub_token)
        try:
            with modes_of_blocks(model, args):
                metrics = loop.fit()
                metrics |= _finish(loop, model)
        except Interrupted as stop:  # a second Ctrl-C does not wait to say it
            stop.checkpoint = stop.checkpoint or loop.checkpoint
            raise
        results = {
            "metrics": metrics,
            "resumed_from_step": first_step if resumed is not None else None,
            "resumed_from_checkpoint": str(resumed) if resumed is not None else None,
            "stopped_early": loop.stopped_early,
            "best": loop.selection.describe(),
            "evaluations": loop.state.evaluations,
            "seconds": round(loop.seconds, 3),
            "images_per_second": round(loop.images_per_second, 2),
            "trainable_parameters": sum(parameter.numel() for parameter in trainable.values()),
            "arguments": asdict(args),
            "versions": versions(),
            "hardware": hardware(accelerator),
            "git_commit": git_commit(),
            **known(),
        }
        with interruption.deferred() if interruption else nullcontext():
            card = describe_run(results, args, training_data, evaluation_data)
            save_trained(accelerator, loop.model, trainable, args, results, image_processor, card)
        if args.push_to_hub and accelerator.is_main_process:
            logger.info("the adapter is saved in %s; now it is uploaded", args.output_dir)
            trained = accelerator.unwrap_model(loop.model, keep_fp32_wrapper=False)
            try:
                results["pushed_to"] = push_run(trained, args, image_processor, card, hub_token)
            except Interrupted as stop:
                stop.saved = True
                raise
        accelerator.wait_for_everyone()
        # Not end_training(), which ends the process group: a script's next run would find none.
        for tracker in accelerator.trackers:
            tracker.finish()
    return results


def _finish(loop: Loop, model: PeftModel) -> dict[str, float]:
    """Give the model the adapter that is to be saved, and measure it, with the registers and without; logged too.

    Raises:
        Interrupted: A signal came; a checkpoint of the last step is written where there can be one.
    """
    selection, state, metrics = loop.selection, loop.state, dict[str, float]()
    if loop.eval_loader is None:
        return metrics
    last, means = None, selection.last if selection.last_step == state.global_step else None
    if loop.args.load_best_model_at_end and selection.weights is not None:
        last, means = checkpoints.copy_weights(loop.accelerator, loop.model), selection.best
        if lacking := checkpoints.put_weights(loop.accelerator, loop.model, selection.weights):
            said = "the checkpoint is of an earlier version and lacks %s of the best step: "
            logger.warning(said + "those of the last step are saved, and measured anew", ", ".join(lacking))
            means = None
    layer = find_register_layer(model)
    with loop.interruption.deferred() if loop.interruption else nullcontext():
        try:
            means = means or loop.evaluate()
            metrics |= {f"eval_{name}": value for name, value in means.items() if name != "step"}
            if layer is not None:  # what the head does alone, or its gain would read as the registers'
                with layer.set_aside():
                    metrics |= {f"{OFF}{name}": value for name, value in loop.evaluate().items()}
        except Interrupted:
            if last is not None:  # a checkpoint goes on from the last adapter, not from the best
                checkpoints.put_weights(loop.accelerator, loop.model, last)
            loop.stop()
    loop.accelerator.log(metrics, step=state.global_step)
    return metrics


def _trainable(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name."""
    trainable = trained_parameters(model)
    if not trainable:
        raise ValueError("no parameter of the model needs a gradient; load the adapter with is_trainable=True")
    return trainable


def _find_start(args: TrainArguments, model: PeftModel, settings: dict[str, Any]) -> tuple[TrainState, Path | None]:
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
    model: PeftModel,
    trainable: dict[str, torch.nn.Parameter],
    train_data: Any,
    eval_data: Any,
    interruption: Interruption | None,
    callbacks: Sequence[Callback],
    image_processor: Any,
) -> Loop:
    """Loaders, optimiser, schedule and model as the loop runs them, with what a checkpoint holds of them."""
    if eval_data is None and args.evaluates_every is not None:
        raise ValueError("eval_steps, load_best_model_at_end and early_stopping_patience need an eval_dataset")
    if eval_data is train_data:  # each has an epoch of its own
        eval_data = copy.copy(eval_data)
    samples = len(eval_data) if eval_data is not None else 0
    learned = {**objective.details(), **_details(callbacks)}
    settings = run_settings(args, accelerator, learned, trainable, train_data, model, samples)
    check_alike({**settings, "eval_samples": samples})
    state, checkpoint = _find_start(args, model, settings)
    selection = Selection(args, state)
    generator = torch.Generator()
    options: dict[str, Any] = {"collate_fn": objective.collate, "num_workers": args.dataloader_num_workers}
    options["worker_init_fn"] = leave_signals_to_the_run if interruption else None
    size = args.per_device_train_batch_size
    loader: Any
    if isinstance(train_data, StreamedDataset):
        place = accelerator.process_index, accelerator.num_processes
        batches = StreamedBatches(train_data, size, *place, num_threads=args.dataloader_num_workers)
        streamed = {"batch_size": None, "collate_fn": objective.collate, "generator": generator}
        loader = DataLoaderShard(batches, accelerator.device, **streamed)
    else:
        loader = DataLoader(train_data, size, shuffle=True, generator=generator, **options)
    eval_loader = DataLoader(eval_data, args.per_device_eval_batch_size, **options) if eval_data is not None else None
    optimizer = torch.optim.AdamW(parameter_groups(trainable, args.weight_decay), lr=args.learning_rate)
    shard_by_block(accelerator, model)
    if isinstance(train_data, StreamedDataset):  # its batches are shared out already
        prepared, optimizer = accelerator.prepare(model, optimizer)
    else:
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if eval_loader is not None:
        eval_loader = accelerator.prepare(eval_loader)
        if args.evaluates_every is not None:
            selection.check(_metric_names(accelerator, objective, prepared, eval_data))
    # It counts optimiser steps whatever the number of processes, so it is not prepared.
    steps = 0 if args.max_train_steps else math.ceil(len(loader) / accelerator.gradient_accumulation_steps)
    total_steps = args.max_train_steps or args.num_train_epochs * steps
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, total_steps)
    random_state, means = None, RunningMeans(accelerator)
    callbacks = [*callbacks, means]
    if checkpoint is not None:
        random_state = checkpoints.load(checkpoint, accelerator, prepared, optimizer, scheduler, callbacks)
        if args.load_best_model_at_end and state.evaluations:
            selection.weights = checkpoints.read_best(checkpoint, accelerator, prepared)
    if args.with_tracking and args.audit_images and eval_data is not None:
        watch = WatchArtifacts(accelerator, eval_data, lambda: state.global_step, args.audit_images, image_processor)
        callbacks = [*callbacks, watch]
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
        means,
        random_state,
        eval_loader,
        selection,
        checkpoint,
        interruption,
        callbacks,
    )


def _details(callbacks: Sequence[Callback]) -> dict[str, Any]:
    return {name: value for callback in callbacks for name, value in callback.details().items()}


def _metric_names(accelerator: Accelerator, objective: Objective, model: torch.nn.Module, data: Any) -> list[str]:
    """Names of the objective's metrics, from one image, before hours are spent on a run that asks for another one."""
    with checkpoints.same_random_state(), torch.no_grad():
        model.eval()
        batch = send_to_device(objective.collate([data[0]]), accelerator.device)
        return sorted(objective.evaluate(model, batch))
