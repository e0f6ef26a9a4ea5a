"""What a run is set up with: accelerator, data sets, groups of parameters, and the settings that a resumption keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType, gather_object
from peft import PeftConfig, PeftModel

from ..data.datasets import ProcessedDataset
from ..data.processors import find_image_processor, source_of
from ..data.sources import no_items
from ..data.streaming import StreamedDataset
from ..errors import MissingExtraError
from ..tuner.config import RegisterConfig
from ..tuner.layer import find_register_layer
from ..tuner.positions import position_layers
from ..utils.environment import has_accelerator
from ..utils.parameters import part_of
from .arguments import TrainArguments

__all__ = [
    "check_alike",
    "check_streamed",
    "image_processor_for",
    "make_accelerator",
    "number_of",
    "parameter_groups",
    "processed",
    "run_settings",
    "shard_by_block",
    "use_cpu",
]


#: Fields of a config that do not change what is learned.
_OF_THE_PLACE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")

#: DeepSpeed's names of two settings, and what its config has where it says nothing: accelerate's launcher writes a 1.
_DEEPSPEED_NAMES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "gradient_accumulation_steps": ("gradient_accumulation_steps", (None, "auto", 1)),
    "max_grad_norm": ("gradient_clipping", (None, "auto")),
}


def use_cpu(args: TrainArguments) -> bool:
    """Whether a run is on the CPU: accelerate must be told so, or processes without a GPU do not find each other."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return args.use_cpu or (several and not has_accelerator())


def make_accelerator(args: TrainArguments) -> Accelerator:
    """The run's accelerator, with its trackers.

    Raises:
        ValueError: The tracker is unknown or not installed, DeepSpeed is to write checkpoints, or its config says
            another accumulation or clipping of gradients.
        MissingExtraError: tensorboard is not installed.
    """
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
    checkpointing = args.checkpointing_steps or args.resume_from_checkpoint or args.load_best_model_at_end
    if checkpointing and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "checkpoints during the run are not offered with DeepSpeed, whose own reader unpickles them; leave out "
            "--checkpointing-steps, --resume-from-checkpoint and --load-best-model-at-end, or use DDP or FSDP2"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        tell_deepspeed(accelerator, args)
    return accelerator


def tell_deepspeed(accelerator: Accelerator, args: TrainArguments) -> None:
    """Write the run's accumulation and clipping of gradients into DeepSpeed's config, which is what DeepSpeed goes by.

    What accelerate fills in where nothing is said, 1 for both, would overrule the run's own in silence.

    Raises:
        ValueError: The config says something else.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    wanted = {
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "max_grad_norm": args.max_grad_norm or 0.0,
    }
    for ours, value in wanted.items():
        name, unsaid = _DEEPSPEED_NAMES[ours]
        said = config.get(name)
        if said not in unsaid and float(said) != value:
            raise ValueError(
                f"DeepSpeed's config says {name}: {said}, and the run says {ours}={value}; give the same number, or "
                f"leave {name} out of the config"
            )
        config[name] = value
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps


def shard_by_block(accelerator: Accelerator, model: PeftModel) -> None:
    """Name the unit of sharding for FSDP, if its config does not.

    accelerate would take transformers' list of what may not be split, which for a ViT has the embeddings too; they hold
    the input embedding, which accelerate shards as a unit of its own, and a parameter cannot be in two.

    Raises:
        ValueError: FSDP, and position embeddings move: it would shard the sum of them and their offsets.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin is not None and position_layers(model):
        raise ValueError("position embeddings cannot be trained under FSDP: leave +positions out, or use DDP")
    layer = find_register_layer(model)
    if plugin is not None and layer is not None and not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in layer.tower.part("blocks")})


def check_streamed(args: TrainArguments) -> None:
    """Refuse what needs the number of the training images, or their places, which a stream does not tell.

    Raises:
        ValueError: There is such a thing.
    """
    if args.max_train_steps is None:
        raise ValueError("a streamed data set has no length: say with max_train_steps how long to train")
    if args.target_store is not None:
        raise ValueError("target_store keeps targets by an image's place, which a streamed data set does not have")
    for name in ("eval_steps", "checkpointing_steps"):
        if getattr(args, name) == "epoch" or (name == "eval_steps" and args.evaluates_every == "epoch"):
            raise ValueError(f"{name} must be a number of steps: the end of a streamed data set is not known before")


def check_dataset(dataset: Any, name: str) -> None:
    """Refuse what is no map-style data set of dictionaries.

    Args:
        dataset: What is to be trained on, or evaluated on.
        name: What to call it in an error.

    Raises:
        ValueError: It has no length or no numbered items, none at all, or they have no keys.
    """
    if isinstance(dataset, str | Mapping) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(
            f"{name} must be a data set with len() and items {{'image': image, 'label': number}}, found "
            f"{type(dataset).__name__}; load_data() of register_adapter.data reads folders, load_stream() shards"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    item = (dataset.dataset if isinstance(dataset, ProcessedDataset) else dataset)[0]
    if (found := no_items(item)) is not None:
        raise ValueError(f"items of {name} must be dictionaries {{'image': image, 'label': number}}, found {found}")


def image_processor_for(model: PeftModel, dataset: Any) -> Any:
    """The image processor of the base model's folder or repository, ``None`` if the items are ready without one.

    Raises:
        ValueError: The model does not say where it came from, there is none, or this is no data set.
    """
    if isinstance(dataset, StreamedDataset):
        return dataset.image_processor
    check_dataset(dataset, "train_dataset")
    if "pixel_values" in dataset[0]:
        return None
    return find_image_processor(source_of(model.get_base_model()))


def processed(dataset: Any, image_processor: Any, name: str) -> Any:
    """The data set itself if its items are ready, else with the image processor in front.

    Args:
        dataset: A map-style data set.
        image_processor: See :func:`find_image_processor`.
        name: What to call the data set in an error.

    Raises:
        ValueError: It is no data set or empty, or its items have neither images nor pixel values.
    """
    if isinstance(dataset, StreamedDataset):
        return dataset
    check_dataset(dataset, name)
    if isinstance(dataset, ProcessedDataset):
        return dataset
    item = dataset[0]
    if "pixel_values" in item:
        return dataset
    if "image" not in item:
        raise ValueError(f"items of {name} must have the key 'image' or 'pixel_values', found {sorted(item)}")
    return ProcessedDataset(dataset, image_processor)


def number_of(dataset: Any) -> int | None:
    """How many items there are, ``None`` if it is a stream."""
    return None if isinstance(dataset, StreamedDataset) else len(dataset)


def parameter_groups(trainable: Mapping[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices of trained modules; none for registers and positions, which it would pull to zero."""
    exempt = ("registers", "gates", "positions")
    decayed = {name for name, parameter in trainable.items() if part_of(name) not in exempt and parameter.ndim > 1}
    groups = [
        {"params": [p for name, p in trainable.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def run_settings(
    args: TrainArguments,
    accelerator: Accelerator,
    objective: Mapping[str, Any],
    trainable: dict[str, torch.nn.Parameter],
    train_data: Any,
    model: PeftModel,
    eval_samples: int = 0,
) -> dict[str, Any]:
    """What the result of a step, and the choice of the best one, depend on, ready for JSON.

    A run is resumed only with the same. What is at its default is ``None``, as in checkpoints of earlier releases.
    """
    names = "per_device_train_batch_size learning_rate weight_decay max_grad_norm lr_scheduler_type num_warmup_steps"
    names += " num_train_epochs max_train_steps seed"
    selecting = args.evaluates_every is not None
    registers = [config for config in model.peft_config.values() if isinstance(config, RegisterConfig)]
    config = registers[0] if registers else RegisterConfig()
    others = {name: config for name, config in model.peft_config.items() if not isinstance(config, RegisterConfig)}
    augmentation = getattr(train_data, "augmentation", None)
    return {name: getattr(args, name) for name in names.split()} | {
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "train_samples": number_of(train_data),
        "objective": dict(objective),
        "trainable": {name: list(parameter.shape) for name, parameter in trainable.items()},
        "augmentation": str(augmentation) if augmentation else None,
        "shuffle_buffer": train_data.shuffle_buffer if isinstance(train_data, StreamedDataset) else None,
        "insert_layer": config.insert_layer or None,
        "deep": config.deep or None,
        "key_value": config.key_value or None,
        "other_adapters": {name: _plain(config) for name, config in others.items()} or None,
        "eval_steps": args.evaluates_every,
        "eval_samples": eval_samples if selecting else None,
        "metric_for_best_model": args.metric_for_best_model if selecting else None,
        "greater_is_better": args.greater_is_better if selecting else None,
        "load_best_model_at_end": args.load_best_model_at_end or None,
    }


def check_alike(settings: Mapping[str, Any]) -> None:
    """Refuse a run whose processes see other data, or were given other settings; every process calls it.

    Raises:
        ValueError: They differ, which would end in a collective that not all of them come to.
    """
    first, *others = gather_object([dict(settings)])
    for index, own in enumerate(others, start=1):
        differ = [name for name in first if own[name] != first[name]]
        if differ:
            said = ", ".join(f"{name} {own[name]!r:.80}, the main one {first[name]!r:.80}" for name in differ)
            raise ValueError(f"process {index} has {said}: give all processes the same images and settings")


def _plain(config: PeftConfig) -> Any:
    """A config of PEFT's as JSON has it, without what differs from machine to machine."""
    values = {name: value for name, value in config.to_dict().items() if name not in _OF_THE_PLACE}
    return json.loads(json.dumps(values, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
