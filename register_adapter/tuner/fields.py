"""The fields of a config: their types, the values that they may have, and which go together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from ..towers.anatomy import Anatomy
from ..towers.identity import is_finite
from .neuron_shift import REMOVALS

__all__ = [
    "check_combinations",
    "check_known",
    "check_name",
    "check_string",
    "check_types",
    "check_values",
    "one_name",
]

# Far more than any model has patches.
_MOST = 2**16
#: What float32 holds, and what normal values of that deviation, and their squares' sums, stay within.
_MOST_GATE, _MOST_STD = 3.4e38, 1e15
# Bytes of a file's name.
_LONGEST = 255
# Names of the modules that hold the registers.
_OWN = {"registers", "register_adapter_tokens"}
_INITS = ("normal", "zeros", "cls", "test_time", "outliers")
_ATTENTIONS = ("slice", "full")
_KINDS: dict[str, Any] = {
    "num_registers": int,
    "init": str,
    "init_std": (int, float),
    "target_modules": (str, list, tuple, set, type(None)),
    "modules_to_save": (list, tuple, set, type(None)),
    "id2label": (dict, type(None)),
    "insert_layer": int,
    "deep": bool,
    "key_value": bool,
    "gate": (int, float, type(None)),
    "register_neurons": (dict, type(None)),
    "remove": str,
    "train_removal": bool,
    "test_time_fit": (dict, type(None)),
    "attentions": str,
    "anatomy": (Anatomy, dict, type(None)),
    "base_tower": (dict, type(None)),
    "format_version": int,
    "weights_sha256": (str, type(None)),
    "base_model_name_or_path": (str, type(None)),
    "revision": (str, type(None)),
    "peft_version": (str, type(None)),
    "inference_mode": bool,
}


def check_types(config: Any) -> None:
    """Every argument of a config of this package has the type of its field.

    Raises:
        TypeError: One has not.
    """
    present = {name: kind for name, kind in _KINDS.items() if hasattr(config, name)}
    for name, kind in present.items():
        value = getattr(config, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            if isinstance(value, type(config)):
                found = f"a {type(value).__name__}; with a config, call get_peft_model(model, config)"
            else:
                found = f"{value!r} of type {type(value).__name__}"
            raise TypeError(f"{name} must be {_spell(kind)}, got {found}")
    for name in ("target_modules", "modules_to_save"):
        value = getattr(config, name)
        if not isinstance(value, str) and any(not isinstance(item, str) for item in value or ()):
            raise TypeError(f"{name} must hold names, got {value!r}")


def check_values(config: Any) -> None:
    """Each argument by itself."""
    if config.num_registers < 1:
        raise ValueError(f"num_registers must be at least 1, got {config.num_registers}")
    if config.num_registers > _MOST:
        raise ValueError(f"num_registers must be at most {_MOST}, got {config.num_registers}")
    if config.format_version < 1:
        raise ValueError(f"format_version must be at least 1, got {config.format_version}")
    for name, allowed in (("init", _INITS), ("attentions", _ATTENTIONS), ("remove", tuple(REMOVALS))):
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
    if own := [name for name in config.modules_to_save or () if not _OWN.isdisjoint(name.split("."))]:
        raise ValueError(
            f"modules_to_save names {own[0]!r}, the registers themselves, which are always saved: leave it out"
        )
    if config.insert_layer < 0:
        raise ValueError(f"insert_layer must be at least 0, got {config.insert_layer}")
    if config.gate is not None and not is_finite(config.gate):
        raise ValueError(f"gate must be a finite number or None, got {config.gate}")
    if not is_finite(config.init_std) or config.init_std < 0:
        raise ValueError(f"init_std must be a finite number of at least 0, got {config.init_std}")
    for name, most in (("gate", _MOST_GATE), ("init_std", _MOST_STD)):
        if abs(getattr(config, name) or 0.0) > most:
            raise ValueError(f"{name} must be at most {most:g} on either side of 0, got {getattr(config, name)}")


def check_combinations(config: Any) -> None:
    """The arguments go together.

    Raises:
        ValueError: Two do not.
    """
    if config.deep and config.key_value:
        raise ValueError("deep=True puts tokens into the sequence, key_value=True does not: choose one of them")
    if config.key_value and config.init == "cls":
        raise ValueError("init='cls' is for tokens; key/value pairs (key_value=True) start from init='normal'")
    if config.init == "outliers" and config.test_time_fit is None:
        raise ValueError(
            "init='outliers' needs images, on which the base's outlier patches are looked up: call "
            "register_adapter.neurons.start_from_outliers(model, batches), or train with --init outliers"
        )


def _spell(kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("None" if k is type(None) else k.__name__ for k in kinds)


def check_name(name: Any) -> None:
    """An adapter's name is a part of its tensors' keys, and the name of the folder that it is saved in.

    Raises:
        TypeError: It is not a string.
        ValueError: It is empty, reserved or too long, has a dot or a slash, begins as the adapters' tensors do, or is
            that of a member of torch's ``ModuleDict``.
    """
    check_string(name)
    wrong = ""
    if not name:
        wrong = "it is empty"
    elif marks := [mark for mark in (".", "/", "\\") if mark in name]:
        wrong = f"it has {marks[0]!r}, and it is a part of tensors' keys and of a folder's path"
    elif not name.isprintable():
        wrong = "it has characters that cannot be printed"
    elif len(name.encode()) > _LONGEST:
        wrong = f"no folder can have a name of more than {_LONGEST} bytes"
    elif name == "__base__":
        wrong = "among adapter_names it stands for the base without an adapter"
    elif name.startswith("register_adapter_"):
        wrong = "the adapters' own tensors have names that begin so, and PEFT 0.18 does not tell them apart"
    elif hasattr(nn.ModuleDict(), name):
        wrong = "torch's ModuleDict, which holds adapters by their names, has a member that is called so"
    if wrong:
        raise ValueError(f"adapter_name {name!r:.100} cannot be used: {wrong}. Choose one such as 'my_registers'.")


def check_string(name: Any) -> None:
    """What a call is given as an adapter's name is one, as far as its type goes.

    Raises:
        TypeError: It is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"adapter_name must be a string, got {name!r:.100} ({type(name).__name__})")


def check_known(names: Any, known: Collection[str], message: str = "no adapter") -> list[str]:
    """The names of adapters that a call is given, one or several, in a list.

    Args:
        names: A name, or an iterable of names.
        known: Those of the adapters that are there.
        message: What is said before the names that are not.

    Raises:
        TypeError: There is something else than strings.
        ValueError: An adapter is not there.
    """
    if isinstance(names, str):
        names = [names]
    elif isinstance(names, Mapping) or not isinstance(names, Iterable):
        raise TypeError(f"adapter_name must be a string or a list of strings, got {names!r:.100}")
    listed = list(names)
    for name in listed:
        check_string(name)
    if unknown := [name for name in listed if name not in known]:
        raise ValueError(f"{message} {', '.join(map(repr, unknown))}; the model has {list(known)}")
    return listed


def one_name(target_modules: str | Iterable[str] | None) -> str | None:
    """``target_modules`` as the name of one tower.

    Raises:
        ValueError: It names several.
    """
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules or [])
    if len(names) > 1:
        raise ValueError(f"target_modules must name one vision tower, got {names}")
    return names[0] if names else None
