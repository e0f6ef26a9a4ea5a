"""Which of PEFT's methods can be beside others on one model."""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from ..config import RegisterConfig
from ..positions import PositionConfig

__all__ = ["KNOW_THEIR_BASE", "check_composable"]

#: Configs of the package's own methods, which are checked against the base they are loaded on.
KNOW_THEIR_BASE = (RegisterConfig, PositionConfig)


def check_composable(name: str, config: PeftConfig) -> None:
    """Check that an adapter of this config can be beside those of other methods.

    Raises:
        ValueError: Its method puts no layers on a model, repeats blocks, or has token indices.
    """
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "tuner_layer_cls"):
        raise ValueError(
            f"the adapter {name!r} is of the method {config.peft_type.value}, which puts no layers on a model's "
            "own modules: it cannot be composed with others"
        )
    if getattr(config, "layer_replication", None):
        raise ValueError(
            f"the adapter {name!r} has layer_replication: LoRA repeats blocks of the base, and neither takes them "
            "off again nor merges them rightly: it cannot be composed with others. Leave layer_replication out."
        )
    if getattr(config, "trainable_token_indices", None):
        raise ValueError(
            f"the adapter {name!r} has trainable_token_indices: what is saved of them beside adapters of other "
            "methods could not be loaded. Leave them out, and train the tokens by an adapter of their own: "
            "TrainableTokensConfig(target_modules=…, token_indices=…)."
        )
