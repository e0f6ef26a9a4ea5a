"""Training registers with Accelerate: set-up, the run, the evaluation, and what is saved at the end."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType, set_seed
from torch.utils.data import DataLoader
from transformers import get_scheduler

from ..data.datasets import ProcessedDataset, load_image_processor
from ..errors import MissingExtraError
from ..tuner._peft_compat import PREFIX
from ..tuner.card import update_model_card
from ..tuner.card_text import OFF
from ..tuner.layer import find_register_layer
from ..tuner.peft_model import RegisterPeftModel
from ..utils.environment import git_commit, hardware, versions
from ..utils.hub import hub_errors
from ..utils.staging import check_writable
from . import checkpoints
from .arguments import TrainArguments
from .checkpoints import TrainState
from .loop import Loop, evaluate
from .objectives import Objective

__all__ = ["TrainArguments", "check_output_dir", "evaluate", "train"]

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
        train_dataset: A map-style data set: items ``{"image": picture, "label": int}``, or, ready for the model,
            ``{"pixel_values": (3, H, W) float, "labels": int}``. Random augmentation is the same after a resumption
            only if it depends on nothing but the item's number.
        args: The knobs.
        eval_dataset: The same for the evaluation at the end; ``None`` for none.
        image_processor: Turns pictures into pixel values; by default that of the base model's folder or repository.
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
    accelerator = _accelerator(args)
    set_seed(args.seed, device_specific=True)
    image_processor = image_processor or _find_image_processor(model, train_dataset)
    train_data = _processed(train_dataset, image_processor, "train_dataset")
    eval_data = _processed(eval_dataset, image_processor, "eval_dataset") if eval_dataset is not None else None
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("no parameter of the model needs a gradient; load the adapter with is_trainable=True")

    settings = _settings(args, accelerator, objective, trainable, len(train_data))
    state, checkpoint = TrainState(settings=settings), None
    if args.resume_from_checkpoint:
        checkpoint = checkpoints.find(args.resume_from_checkpoint, str(args.output_dir))
        if checkpoint is None:
            logger.warning("there is no checkpoint in %s yet; starting anew", args.output_dir)
        else:
            state = checkpoints.read_state(checkpoint, settings)
            checkpoints.load_adapter(model, checkpoint)

    generator = torch.Generator()
    loader = DataLoader(
        train_data,
        args.per_device_train_batch_size,
        shuffle=True,
        collate_fn=objective.collate,
        num_workers=args.dataloader_num_workers,
        generator=generator,
    )
    optimizer = torch.optim.AdamW(_parameter_groups(trainable, args.weight_decay), lr=args.learning_rate)
    _shard_by_block(accelerator, model)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loop = Loop(accelerator, args, objective, prepared, optimizer, loader, generator, state)
    # It counts optimiser steps whatever the number of processes, so it is not prepared.
    loop.scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, loop.total_steps)
    if checkpoint is not None:
        loop.random_state = checkpoints.load(checkpoint, accelerator, prepared, optimizer, loop.scheduler)
    if accelerator.is_main_process and args.output_dir:
        check_writable(args.output_dir)
        if args.overwrite_output_dir and checkpoint is None:
            checkpoints.remove_all(args.output_dir)
    accelerator.wait_for_everyone()
    if args.with_tracking:
        flat = {key: value for key, value in asdict(args).items() if isinstance(value, bool | int | float | str)}
        accelerator.init_trackers("register_adapter", flat)

    first_step = state.global_step
    metrics = loop.fit()
    if eval_data is not None:
        eval_loader = DataLoader(
            eval_data,
            args.per_device_eval_batch_size,
            collate_fn=objective.collate,
            num_workers=args.dataloader_num_workers,
        )
        eval_loader = accelerator.prepare(eval_loader)
        values = evaluate(accelerator, prepared, objective, eval_loader)
        found = {f"eval_{name}": value for name, value in values.items()}
        layer = find_register_layer(model)
        if layer is not None:  # what the head does alone, or its gain would read as the registers'
            with layer.set_aside():
                off = evaluate(accelerator, prepared, objective, eval_loader)
            found |= {f"{OFF}{name}": value for name, value in off.items()}
        accelerator.log(found, step=state.global_step)
        metrics |= found
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
    weights = checkpoints.adapter_weights(accelerator, prepared)
    trained = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    trained.eval()
    _check_finite(weights or {name: parameter for name, parameter in trained.named_parameters() if name in trainable})
    if accelerator.is_main_process and args.output_dir:
        card = _card(results, args, training_data, evaluation_data)
        _save(trained, weights, Path(args.output_dir), results, image_processor, card)
        if args.push_to_hub:
            _push(trained, args, image_processor, card, hub_token)
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
            "with --resume_from_checkpoint latest, choose another --output_dir, or delete them with "
            "--overwrite_output_dir"
        )


def use_cpu(args: TrainArguments) -> bool:
    """Whether a run is on the CPU: accelerate must be told so, or processes without a GPU do not find each other."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
    return args.use_cpu or (several and not device)


def _accelerator(args: TrainArguments) -> Accelerator:
    trackers = [str(name) for name in get_available_trackers()]
    if args.with_tracking:
        known = [kind.value for kind in LoggerType]
        if args.report_to not in known:
            raise ValueError(f"report_to must be one of {', '.join(known)}, got {args.report_to!r}")
        if not trackers or args.report_to not in ("all", *trackers):
            if args.report_to in ("all", "tensorboard"):
                raise MissingExtraError("reports to a tracker", "tensorboard", "train")
            raise ValueError(f"report_to={args.report_to!r} needs its package, which is not installed")
    accelerator = Accelerator(
        cpu=use_cpu(args),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
    )
    checkpointing = args.checkpointing_steps or args.resume_from_checkpoint
    if checkpointing and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "checkpoints during the run are not offered with DeepSpeed, whose own reader unpickles them; leave out "
            "--checkpointing_steps and --resume_from_checkpoint, or use DDP or FSDP2"
        )
    return accelerator


def _shard_by_block(accelerator: Accelerator, model: RegisterPeftModel) -> None:
    """Name the unit of sharding for FSDP, if its config does not.

    accelerate would take transformers' list of what may not be split, which for a ViT has the embeddings too; they hold
    the input embedding, which accelerate shards as a unit of its own, and a parameter cannot be in two.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    layer = find_register_layer(model)
    if plugin is not None and layer is not None and not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in layer.tower.part("blocks")})


def _find_image_processor(model: RegisterPeftModel, dataset: Any) -> Any:
    if len(dataset) == 0 or "pixel_values" in dataset[0]:
        return None
    name = getattr(model.get_base_model(), "name_or_path", None)
    if not name:
        raise ValueError("the items are pictures and the model does not say where it came from: give image_processor=")
    return load_image_processor(name)


def _processed(dataset: Any, image_processor: Any, name: str) -> Any:
    """The data set itself if its items are ready, else with the image processor in front."""
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    if isinstance(dataset, ProcessedDataset):
        return dataset
    item = dataset[0]
    if "pixel_values" in item:
        return dataset
    if "image" not in item:
        raise ValueError(f"items of {name} must have the key 'image' or 'pixel_values', found {sorted(item)}")
    return ProcessedDataset(dataset, image_processor)


def _parameter_groups(trainable: dict[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices of trained modules; none for registers, which it would pull to equal values at zero."""
    decayed = {name for name, parameter in trainable.items() if PREFIX not in name and parameter.ndim > 1}
    groups = [
        {"params": [p for name, p in trainable.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _settings(
    args: TrainArguments,
    accelerator: Accelerator,
    objective: Objective,
    trainable: dict[str, torch.nn.Parameter],
    samples: int,
) -> dict[str, Any]:
    """What a step's result depends on, ready for JSON."""
    names = "per_device_train_batch_size learning_rate weight_decay max_grad_norm lr_scheduler_type num_warmup_steps"
    names += " num_train_epochs max_train_steps seed"
    return {name: getattr(args, name) for name in names.split()} | {
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "train_samples": samples,
        "objective": objective.details(),
        "trainable": {name: list(parameter.shape) for name, parameter in trainable.items()},
    }


def _check_finite(tensors: dict[str, Any]) -> None:
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise FloatingPointError(f"not finite after training, nothing is saved: {broken[:5]}; lower the learning rate")


def _save(
    model: RegisterPeftModel,
    weights: dict[str, Any] | None,
    folder: Path,
    results: dict[str, Any],
    image_processor: Any,
    card: dict[str, Any],
) -> None:
    """Write adapter, card, image processor and results."""
    model.save_pretrained(str(folder), state_dict=weights)
    name = str(model.active_adapter)
    update_model_card(
        folder / "README.md",
        model.peft_config[name],
        type(model.get_base_model()),
        **card,
        adapter=folder.absolute().name,
        subfolder=None if name == "default" else name,
    )
    if image_processor is not None:
        image_processor.save_pretrained(folder)
    scratch = folder / ".results.json"
    scratch.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    scratch.replace(folder / "results.json")


def _card(
    results: dict[str, Any], args: TrainArguments, training_data: str | None, evaluation_data: str | None
) -> dict[str, Any]:
    """What the card says of the run: the data, its size, and the metrics that were measured on the evaluation set."""
    metrics = {key: value for key, value in results["metrics"].items() if key.startswith("eval_")}
    run = {"Training images": results["train_samples"], "Evaluation images": results["eval_samples"]}
    return {
        "training_data": training_data,
        "evaluation_data": evaluation_data if metrics else None,
        "metrics": metrics or None,
        "run": run | {"Steps": results["global_step"], "Seed": args.seed, "Objective": results["objective"]["name"]},
    }


def _push(
    model: RegisterPeftModel,
    args: TrainArguments,
    image_processor: Any,
    card: dict[str, Any],
    token: str | None,
) -> None:
    """Upload adapter, card and image processor."""
    name = str(args.hub_model_id)
    model.push_to_hub(name, private=args.hub_private, token=token, **card)
    if image_processor is not None:
        with hub_errors(name, token=token):
            image_processor.push_to_hub(name, token=token)
