"""Weights of heads: those of a file that have no place in a model, and those of a model that nobody trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ...utils.adapter_file import check_tensors, is_of
from ...utils.module_names import names_that_load
from ..config import RegisterConfig
from ..heads import TRAINED_BESIDE, modules_called

__all__ = [
    "check_file_tensors",
    "lacking_heads",
    "warn_of_left_out",
    "warn_of_new_weights",
    "without_left_out",
]

_SHOWN = 5


def check_file_tensors(config: RegisterConfig, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """What is loaded into an adapter is what its config mentions, no less and no more.

    Raises:
        AdapterFileError: It is not.
    """
    heads = config.modules_to_save or []
    needed = [name for name in heads if config.needs(name)]
    check_tensors(tensors, config.expected_shapes, [*heads, *config.left_out], f"adapter {adapter_name!r}", needed)


def without_left_out(
    model: nn.Module, left_out: Iterable[str], optional: Iterable[str], state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A file's tensors without those of modules that this model lacks; warns of the optional ones that go.

    Args:
        model: The model with the adapter.
        left_out: Names of modules that were left out with a warning.
        optional: Names that PEFT has added for the task; a model may lack them.
        state_dict: The adapter's tensors.
    """
    lacking = [name for name in dict.fromkeys(optional) if not modules_called(model, name)]
    gone: dict[str, str] = {}
    for key in state_dict:
        if ".modules_to_save." not in key:
            gone.update((key, name) for name in (*left_out, *lacking) if is_of(key, name))
    if dropped := [name for name in lacking if name in gone.values()]:
        warn_of_left_out(model, dropped)
    return {key: value for key, value in state_dict.items() if key not in gone}


def lacking_heads(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of ``modules_to_save`` that a model has no module of, or none with something in it to save."""
    return [
        name
        for name in dict.fromkeys(names)
        if not any(module.state_dict() for module in modules_called(model, name).values())
    ]


def warn_of_left_out(model: nn.Module, names: list[str], rest: str = "registers") -> None:
    """Warn that an adapter's modules have no place in this model; ``rest`` is what of it has."""
    while isinstance(model, PeftModel):
        model = model.base_model.model
    warnings.warn(
        f"the adapter has {', '.join(map(repr, names))} trained beside its {rest}, and {type(model).__name__} has no "
        f"module of that name with parameters: it is left out, the {rest} are loaded whole. To have it too, load the "
        "adapter onto a base of the class that it was trained with.",
        stacklevel=4,
    )


def warn_of_new_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Warn of weights that the base's checkpoint did not have and that are not among the modules ``names``.

    They were drawn at random when it was loaded, are frozen like the rest of the base, and stay random.
    """
    places = sorted({key.rpartition(".")[0] for key in _new_weights(model)})
    trained = [*names, *TRAINED_BESIDE.get()]
    kept = [path for path in places if not any(f".{name}." in f".{path}." for name in trained)]
    if kept:
        heads = names_that_load(model, [path.partition(".")[0] for path in kept])
        warnings.warn(
            f"the checkpoint of the base had no weights for {', '.join(kept[:_SHOWN])}"
            f"{f' and {len(kept) - _SHOWN} more' if len(kept) > _SHOWN else ''} of {type(model).__name__}: they were "
            "drawn at random when it was loaded, and are frozen now. If you need their outputs and have not trained "
            f"them since, train them beside the registers: modules_to_save={heads}.",
            stacklevel=4,
        )


def _new_weights(model: nn.Module) -> list[str]:
    """Names of parameters that were made anew when a checkpoint was loaded, as far as transformers tells."""
    if not isinstance(model, PreTrainedModel) or getattr(model, "hf_quantizer", None) is not None:
        return []
    inside = tuple(
        f"{path}."
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )
    plain = {key: value for key, value in model.named_parameters() if not key.startswith(inside)}
    marked = [key for key, value in plain.items() if getattr(value, "_is_hf_initialized", False)]
    if marked:  # transformers 5 marks every parameter that was in the checkpoint
        return [key for key, value in plain.items() if value.is_floating_point() and key not in set(marked)]
    # transformers 4 leaves no trace but the checkpoint's class: a bare tower has no head.
    prefix = model.base_model_prefix
    saved = getattr(model.config, "architectures", None) or []
    if model.name_or_path and hasattr(model, prefix) and saved == [type(getattr(model, prefix)).__name__]:
        return [key for key in plain if not key.startswith(f"{prefix}.")]
    return []
