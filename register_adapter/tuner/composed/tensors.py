"""Which tensors of a model with adapters of several methods are one adapter's, and which are others' or the base's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from peft.functional import get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...errors import AdapterFileError
from .._peft_compat import named_as_in_state, with_one

__all__ = ["adapter_tensors", "check_filled", "check_own", "check_read", "keys_of_others"]


def adapter_tensors(composed: Any, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One adapter's tensors by the keys of PEFT's files.

    PEFT leaves out every key with another adapter's name *anywhere* in it: an adapter called "registers", or like any
    module of the base, would take the others' tensors along. So the others are left out here, where their names stand.
    """
    foreign = keys_of_others(composed, name)
    own = {key: value for key, value in state.items() if not f"{key}.".startswith(foreign)}
    return cast(
        "dict[str, torch.Tensor]",
        get_peft_model_state_dict(with_one(composed, name), own, adapter_name=name, save_embedding_layers=False),
    )


def keys_of_others(composed: Any, name: str) -> tuple[str, ...]:
    """How the keys of the other adapters' tensors begin, with the adapter's name and a dot at their end."""
    others = [other for other in composed.peft_config if other != name]
    begins = [f"base_model.{child}.{other}." for child in composed.base_model.shared for other in others]
    for path, module in named_as_in_state(composed):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            tables = (*module.adapter_layer_names, *module.other_param_names)
            begins += [f"{path}.{table}.{other}." for table in tables for other in others]
    return tuple(begins)


def check_own(composed: Any, name: str, keys: Iterable[str], path: Path) -> None:
    """No tensor of a file has the name of one that is in the model already, and not the adapter's.

    Args:
        composed: The model.
        name: The adapter.
        keys: The file's.
        path: The adapter's folder.

    Raises:
        AdapterFileError: One has, and PEFT would put it there.
    """
    state = composed.state_dict()
    if foreign := sorted((set(keys) - set(adapter_tensors(composed, name, state))) & set(state)):
        raise AdapterFileError(
            f"the tensors in {path} would replace tensors of the base that the adapter does not train: "
            f"{foreign[:10]}. Nothing was changed."
        )


def check_read(composed: Any, name: str, result: Any, path: Path) -> None:
    """A file had every tensor of an adapter, and no others.

    Args:
        composed: The model.
        name: The adapter.
        result: What PEFT says of the keys.
        path: The adapter's folder.

    Raises:
        AdapterFileError: One is missing, or not expected.
    """
    # PEFT takes any key with these letters in it for the adapter's.
    end = PEFT_TYPE_TO_PREFIX_MAPPING[composed.peft_config[name].peft_type]
    foreign = keys_of_others(composed, name)
    unread = [key for key in _unread(composed, result.missing_keys) if not f"{key}.".startswith(foreign)]
    missing = [key for key in unread if name in key.rpartition(end)[2].split(".")]
    # PEFT 0.18 draws VeRA's shared projections again from their seed, and leaves the saved ones unread.
    drawn = tuple(f"base_model.{child}" for child in composed.base_model.shared)
    # LoRA with bias="all" and a saved head has the head's bias twice, once by a name that is no module's.
    unexpected = [key for key in result.unexpected_keys if not key.endswith(".modules_to_save.bias")]
    strange = [*missing, *(key for key in unexpected if not key.startswith(drawn))]
    if strange:
        raise AdapterFileError(
            f"the tensors in {path} do not fit {type(composed.get_base_model()).__name__}: missing or not expected "
            f"{strange[:10]}"
        )


def check_filled(model: Any, keys: Iterable[str]) -> None:
    """The one adapter of a model that PEFT has loaded got all its values; PEFT warns where it did not.

    Args:
        model: The ``PeftModel``.
        keys: The file's.

    Raises:
        AdapterFileError: A value was not in the file, by its name in this model.
    """
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if empty := sorted(set(own) - set(keys)):
        raise AdapterFileError(
            f"it has no values for {empty[0]!r}{f' and {len(empty) - 1} more' if len(empty) > 1 else ''} of "
            f"{type(model.get_base_model()).__name__}. An adapter of another class of model, such as one with a head, "
            "is loaded with the whole folder that save_adapters wrote"
        )


def _unread(composed: nn.Module, missing_keys: list[str]) -> list[str]:
    """Keys that a file did not have, without other names of parameters that it had (VBLoRA's bank is in each layer)."""
    parameters = dict(composed.named_parameters(remove_duplicate=False))
    missing = set(missing_keys)
    read = {id(value) for key, value in parameters.items() if key not in missing}
    return [key for key in missing_keys if id(parameters.get(key)) not in read]
