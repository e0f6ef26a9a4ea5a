"""Checkpoints of a training run: the adapter, what surrounds it, and the place in the data; never the frozen base.

A checkpoint is written beside its place under another name and renamed when it is whole, so that a run killed at any
moment leaves only whole ones. accelerate's ``save_state`` is not used: it writes the whole model, and its loader goes
on without the random states if they cannot be read, which would break a bit-exact resumption in silence.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn

from ...tuner.composed import ComposedPeftModel
from ...tuner.neuron_shift import NeuronShift
from ...tuner.reading import naming
from ...utils.adapter_file import read_tensors
from ...utils.files import checksum, open_regular
from ...utils.hub import MANIFEST_NAME
from ...utils.parameters import trained_parameters
from ...utils.random_states import random_state, same_random_state, set_random_state
from ...utils.staging import naming_files, scratch_folder
from ...utils.text import size_text
from ..callbacks import Callback
from .fitting import check_like, check_optimizer
from .state import STATE, CheckpointError, TrainState, find_all

__all__ = [
    "adapter_weights",
    "copy_weights",
    "load",
    "load_adapter",
    "put_weights",
    "read_best",
    "save",
]

_TENSORS, _ADAPTER = "train_state.pt", "adapter_model.safetensors"
#: The adapter of the best evaluation so far, where that is to be saved at the end.
_BEST = "best_model.safetensors"


def save(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    state: TrainState,
    output_dir: str | Path,
    total_limit: int | None = None,
    best: dict[str, torch.Tensor] | None = None,
    callbacks: Sequence[dict[str, Any]] = (),
    write_card: Callable[[PeftModel, Path], None] | None = None,
) -> Path:
    """Write ``checkpoint-<global_step>``; every process calls it, the main one writes.

    Args:
        accelerator: The run's accelerator.
        model: The prepared model.
        optimizer: The prepared optimiser.
        scheduler: The learning rate scheduler.
        state: Where the run is.
        output_dir: The run's folder.
        total_limit: Keep this many checkpoints, the newest; ``None`` keeps all.
        best: The best adapter so far, from :func:`copy_weights`.
        callbacks: What each callback says of its state.
        write_card: Says in the README of the folder that it is given what the run is, beside what the adapter is.

    Returns:
        The checkpoint's folder.
    """
    weights = adapter_weights(accelerator, model)
    tensors = {
        "optimizer": _optimizer_state(accelerator, model, optimizer),
        "scheduler": scheduler.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "random": gather_object([random_state()]),
        "callbacks": list(callbacks),
    }
    target = Path(output_dir) / f"checkpoint-{state.global_step}"
    if accelerator.is_main_process:
        with scratch_folder(output_dir) as scratch:
            # Of the checkpoint's own name, which its card tells.
            new = scratch / "new" / target.name
            with naming_files(new, target):
                saved = accelerator.unwrap_model(model)
                saved.save_pretrained(new, state_dict=weights)
                if write_card is not None:
                    write_card(saved, new)
                _write_tensors(tensors, new / _TENSORS)
                if best is not None:
                    save_file({name: tensor.contiguous() for name, tensor in best.items()}, new / _BEST)
                written = sorted(path for path in new.rglob("*") if path.suffix in (".pt", ".safetensors", ".json"))
                files = {path.relative_to(new).as_posix(): checksum(path) for path in written}
                files[STATE] = state.checksum()
                (new / STATE).write_text(json.dumps(asdict(state) | {"files": files}, indent=2) + "\n", "utf-8")
            if target.exists():  # a run resumed from an earlier checkpoint comes by here again
                target.replace(scratch / "old")
            new.replace(target)
            for index, extra in enumerate(find_all(output_dir)[: -total_limit or None] if total_limit else []):
                extra.replace(scratch / f"extra-{index}")
    accelerator.wait_for_everyone()
    return target


def _write_tensors(tensors: dict[str, Any], path: Path) -> None:
    """Write what goes on beside the adapter.

    Raises:
        OSError: It cannot be written; torch has another exception for a full disk.
    """
    try:
        torch.save(tensors, path)
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise OSError(f"{path} of a checkpoint could not be written, is the disk full? ({said})") from error


def load_adapter(model: PeftModel, checkpoint: Path) -> None:
    """Load a checkpoint's adapter into the model, before it is prepared for several devices.

    Raises:
        AdapterFileError: The file is damaged or does not fit the model.
        CheckpointError: It is not of a model with several adapters, and the model is one.
    """
    if isinstance(model, ComposedPeftModel):
        if not (checkpoint / MANIFEST_NAME).is_file():  # PEFT would take the folder for one adapter's
            raise CheckpointError(f"{checkpoint} has no file {MANIFEST_NAME}, which says what adapters it holds")
        model.load_adapter(checkpoint, str(model.active_adapter), is_trainable=True)
        return
    name = str(model.active_adapter)
    path = (checkpoint if name == "default" else checkpoint / name) / _ADAPTER
    tensors = read_tensors(path)
    with naming(path):
        set_peft_model_state_dict(model, tensors, name)


def read_best(checkpoint: Path, accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """The best adapter that the run had before a checkpoint, after an evaluation, where it is to be saved at the end.

    Args:
        checkpoint: The folder.
        accelerator: The run's accelerator.
        model: The prepared model, which the adapter is to fit: at the end of the run it would be too late.

    Raises:
        AdapterFileError: The file is damaged.
        CheckpointError: It is not there, or is not of what this run trains.
    """
    path = checkpoint / _BEST
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} has no file {_BEST}, the best adapter so far, which is to be saved")
    weights = dict(read_tensors(path))
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):  # theirs is in parts
        inner = accelerator.unwrap_model(model)
        trained = trained_parameters(inner)
        # Buffers may be missing: see :func:`put_weights`.
        own = trained | {name: value for name, value in _moving_buffers(inner).items() if name in weights}
        odd = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
        odd += [name for name in own.keys() & weights.keys() if not bool(weights[name].isfinite().all())]
        if odd:
            raise CheckpointError(
                f"{path} is not of what this run trains: {odd[0]} is missing, misshapen, or not finite"
            )
    return weights


def copy_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained as it is now, on the CPU; every process calls it, and where it is sharded the main one has it."""
    weights = adapter_weights(accelerator, model)
    if weights is None:
        inner = accelerator.unwrap_model(model)
        weights = trained_parameters(inner) | _moving_buffers(inner)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}


def put_weights(accelerator: Accelerator, model: nn.Module, weights: dict[str, torch.Tensor]) -> list[str]:
    """Give the prepared model the adapter of :func:`copy_weights`; every process calls it.

    Returns:
        Buffers that ``weights`` lacks, as the best adapter in a checkpoint of an earlier version does; they stay.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(model, dict(weights), options=options)
        return []
    inner = accelerator.unwrap_model(model)
    with torch.no_grad():
        for name, parameter in trained_parameters(inner).items():
            parameter.copy_(weights[name])
        buffers = _moving_buffers(inner)
        for name in buffers.keys() & weights.keys():
            buffers[name].copy_(weights[name])
    return [name for name in buffers if name not in weights]


def _moving_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is saved with the trained parameters and changes without a gradient, by name.

    How far register neurons are shifted, which a run may anneal, and the buffers of modules that are saved as a whole,
    such as the running statistics of a BatchNorm.
    """
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, NeuronShift) and module.slices and not isinstance(module.strength, nn.Parameter):
            found[f"{name}.strength"] = module.strength
        elif isinstance(module, ModulesToSaveWrapper):
            state = module.modules_to_save.state_dict(prefix=f"{name}.modules_to_save.", keep_vars=True)
            found |= {key: value for key, value in state.items() if not isinstance(value, nn.Parameter)}
    return found


def _check_unpacked(file: BinaryIO) -> None:
    """Refuse a file that takes more memory than it has bytes: torch packs nothing, and unpacks whatever is packed.

    Raises:
        ValueError: It is one.
        zipfile.BadZipFile: It is no file of torch's.
    """
    with zipfile.ZipFile(file) as archive:
        inside = sum(entry.file_size for entry in archive.infolist())
    if inside > file.seek(0, os.SEEK_END):
        raise ValueError(f"it unpacks to {size_text(inside)}, and torch writes such files unpacked")
    file.seek(0)


def load(
    checkpoint: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    callbacks: Sequence[Callback] = (),
) -> Any:
    """Load optimiser, scheduler, gradient scaler and callbacks, after all were prepared.

    Returns:
        This process's random state, for :func:`set_random_state` once the data are in place.

    Raises:
        CheckpointError: The file is damaged, holds more than tensors and numbers, or does not fit.
    """
    path = checkpoint / _TENSORS
    try:
        with open_regular(path) as file:
            _check_unpacked(file)
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        check_like("the schedule", scheduler.state_dict(), tensors["scheduler"])
        scheduler.load_state_dict(tensors["scheduler"])
        _load_optimizer_state(accelerator, model, optimizer, tensors["optimizer"])
        if accelerator.scaler is not None and tensors["scaler"] is not None:
            accelerator.scaler.load_state_dict(tensors["scaler"])
        for callback, said in zip(callbacks, tensors.get("callbacks", ()), strict=False):
            callback.load_state_dict(model, said)
        own = tensors["random"][accelerator.process_index]
        with same_random_state():  # that it can be set is known before the first step
            set_random_state(own)
        return own
    except Exception as error:  # whatever becomes of a file that is damaged, or of another kind
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be loaded ({type(error).__name__}: {reason})") from error


def adapter_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Any] | None:
    """What is trained, gathered from all processes where it is sharded; ``None`` where the model has it whole."""
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return get_model_state_dict(model, options=_gathered())
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return dict(accelerator.get_state_dict(model))
    return None


def _optimizer_state(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> Any:
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return get_optimizer_state_dict(model, optimizer.optimizer, options=_gathered())
    return optimizer.state_dict()


def _load_optimizer_state(accelerator: Accelerator, model: nn.Module, optimizer: Any, state: Any) -> None:
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        set_optimizer_state_dict(model, optimizer.optimizer, state, options=_gathered())
        return
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        check_optimizer(optimizer, state)
    optimizer.load_state_dict(state)


def _gathered() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
