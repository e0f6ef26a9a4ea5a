"""Every touch of PEFT's internals: the new member of its enum of methods, and the registration.

PEFT has no plug-in entry points: ``register_peft_method`` insists that the name is a member of ``PeftType``, and
transformers calls ``.value`` on it, so the enum gets a real member.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

__all__ = ["METHOD", "PREFIX", "peft_type", "register"]

METHOD = "register_adapter"
PREFIX = "register_adapter_"


def peft_type() -> Any:
    """The enum member ``PeftType.REGISTER_ADAPTER``, made on first use."""
    name = METHOD.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType.__members__[name]


def register(config_cls: type, model_cls: type) -> None:
    """Make the method known to PEFT; a second call does nothing."""
    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=METHOD, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
