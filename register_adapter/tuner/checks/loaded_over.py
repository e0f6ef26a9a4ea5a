"""Values that are loaded over those of an adapter: they must be for it, and the classes of its head come with them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

from peft import PeftConfig
from torch import nn

from ...errors import AdapterFileError, BaseModelMismatchError, RegisterAdapterError
from ...towers.identity import but_for_trained
from ...towers.tower import Tower
from ...utils.hub import find_config
from .._peft_compat import FromFile
from ..config import RegisterConfig
from ..heads import labels_for
from ..layer import RegisterLayer, register_layers
from ..neuron_shift import count_neurons
from .head_weights import lacking_heads, warn_of_left_out
from .placing import biases_tell, checked_identity

__all__ = ["check_same_base", "loading_over", "read_beside"]

#: What a file's tensors do not tell, and the registers' values are worth nothing without.
_PLACED = ("insert_layer", "deep", "key_value", "remove", "register_neurons")


@contextmanager
def loading_over(model: nn.Module, adapter_name: str, tensors: Mapping[str, Any]) -> Iterator[list[str]]:
    """A context in which an adapter gets its values; one that had some gets the classes that are beside the new ones.

    A new adapter was compared with its base as it was put on, and has the classes of its config, which the caller may
    have given; one whose config the caller has made was not.

    Args:
        model: The model with the adapter.
        adapter_name: Its name.
        tensors: What is loaded.

    Yields:
        Names of modules in the file that the model lacks.

    Raises:
        AdapterFileError: The config beside the tensors is damaged, or puts the registers elsewhere in the model; before
            anything is loaded.
        BaseModelMismatchError: It is for another base.
    """
    layers = [layer for layer in register_layers(model) if adapter_name in layer.names]
    compared = [layer.before for layer in layers if layer.before is not None and layer.before.compared]
    over = isinstance(tensors, FromFile) and not compared
    config = cast(Any, model).peft_config[adapter_name]
    # Trusted where it was made in code, and may say what a file's may not.
    own = {} if config.anatomy is None else {"anatomy": config.anatomy}
    saved = cast("RegisterConfig | None", read_beside(RegisterConfig, tensors, **own)) if over else None
    if saved is None:
        yield []
        return
    saved.ignore_base_mismatch = any(layer.before is not None and layer.before.waived for layer in layers)
    _check_placement(config, saved, adapter_name)
    for layer in layers:
        layer.renew_bases()
        check_same_base(layer.tower, config, saved, biases_tell(model))
    if lacking := lacking_heads(model, saved.modules_to_save or ()):
        warn_of_left_out(model, lacking)
    yield lacking
    if saved.id2label:
        _name(model, adapter_name, saved.id2label, layers)


def read_beside(kind: type[PeftConfig], tensors: Mapping[str, Any], **options: Any) -> PeftConfig | None:
    """The config beside tensors that were read from a folder or a repository; ``None`` for weights alone.

    Args:
        kind: The method's class of configs.
        tensors: The tensors.
        **options: For its ``from_pretrained``.

    Raises:
        AdapterFileError: It is damaged, of another method, or of another save than they.
    """
    name, given = cast(FromFile, tensors).source
    hub = {key: value for key, value in PeftConfig._split_kwargs(given)[0].items() if value is not None}
    subfolder = hub.pop("subfolder", None)
    try:
        find_config(name, subfolder, dict(hub))
    except RegisterAdapterError:
        return None
    return kind.from_pretrained(name, subfolder, **hub, **options)


def _check_placement(config: RegisterConfig, saved: RegisterConfig, adapter_name: str) -> None:
    own, given = ({name: getattr(one, name) for name in _PLACED} for one in (config, saved))
    for values in (own, given):
        values["register_neurons"] = count_neurons(values["register_neurons"] or {})
        if not values["register_neurons"]:
            del values["remove"]
    if differing := [name for name in _PLACED if own.get(name) != given.get(name)]:
        name = differing[-1]
        raise AdapterFileError(
            f"its registers have {name}={given.get(name)!r}, and those of the adapter {adapter_name!r} in the model "
            f"{name}={own.get(name)!r}: the values would be used in a way that they were not trained in. Load it under "
            "a new adapter_name. Nothing was changed."
        )


def check_same_base(tower: Tower, config: Any, saved: Any, biases: bool = True) -> None:
    """The values of a saved config are for the base that an adapter is on.

    Args:
        tower: The vision tower.
        config: The adapter's, which names the base as it is now.
        saved: The saved one.
        biases: Whether biases tell anything of the base.

    Raises:
        BaseModelMismatchError: They are for another one. Of weights of the base that are trained along, it is a
            warning that they are others.
    """
    now, before = config.identity, saved.identity
    try:
        if now is not None:
            checked_identity(now, saved, biases)
    except BaseModelMismatchError as error:
        if now.differences(but_for_trained(tower, before, now)):
            raise
        warnings.warn(
            f"the base is trained along, and has other weights than when this was saved: {error}", stacklevel=4
        )


def _name(model: Any, adapter_name: str, labels: dict[int, str], layers: list[RegisterLayer]) -> None:
    config = model.peft_config[adapter_name]
    with suppress(ValueError):  # names of another number than the head has outputs are none of its classes
        fitting = labels_for(model, config.modules_to_save or [], labels, adapter_name)
        for layer in layers:
            layer.labels.renew()
            layer.labels[adapter_name] = fitting or labels
            layer.show_labels()
        config.id2label = fitting
