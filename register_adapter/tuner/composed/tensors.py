"""Which tensors of a model with adapters of several methods are one adapter's, and which are others' or the base's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from peft.functional import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from ...errors import AdapterFileError
from .._peft_compat import named_as_in_state, with_one

__all__ = ["adapter_tensors", "check_own", "keys_of_others"]


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
