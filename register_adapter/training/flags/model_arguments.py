"""The flags that say which model gets registers, which registers, and what moves."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ...tuner.config import RegisterConfig
from ..moving import PARTS, Moving

__all__ = ["ModelArguments"]

#: Where registers enter, and how.
_PLACEMENT = ("insert_layer", "deep", "key_value", "gate")


@dataclass
class ModelArguments:
    """Which model gets registers, and which.

    Raises:
        ValueError: A value is out of range, or two contradict each other.
    """

    model_name_or_path: str = field(metadata={"help": "Model on the Hub, or its folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    image_processor_name: str | None = field(default=None, metadata={"help": "Image processor, if not the model's."})
    objective: str = field(default="classification", metadata={"help": "What to train on."})
    train: str = field(
        default="registers",
        metadata={"help": f"What moves: any of {PARTS}, joined by +, such as registers+lora."},
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA, where it moves."})
    lora_alpha: int = field(default=16, metadata={"help": "Its scale, times the rank."})
    num_registers: int = field(default=4, metadata={"help": "Number of registers."})
    init: Literal["normal", "zeros", "cls", "test_time", "outliers"] = field(
        default="normal",
        metadata={
            "help": "Their initial values; test_time finds register neurons on the training images first, and outliers "
            "the base's outlier patches."
        },
    )
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of those."})
    insert_layer: int = field(default=0, metadata={"help": "First block that has registers."})
    deep: bool = field(default=False, metadata={"help": "Fresh registers at every block."})
    key_value: bool = field(
        default=False, metadata={"help": "Key/value pairs in every block's attention instead of tokens."}
    )
    gate: float | None = field(
        default=None, metadata={"help": "Learned bias on the registers' attention logits, and its initial value."}
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Adapter to continue from, such as a fitted one: folder, or name on the Hub."}
    )
    neurons: Literal["keep", "drop", "anneal"] = field(
        default="keep",
        metadata={"help": "Register neurons of that adapter: train their strengths, drop them, or let them fade away."},
    )

    def __post_init__(self) -> None:
        if self.adapter_name_or_path and self.init != "normal":
            raise ValueError(f"--adapter-name-or-path brings initial values along; leave out --init {self.init}")
        if self.neurons != "keep" and not (self.adapter_name_or_path or self.init == "test_time"):
            raise ValueError(f"--neurons {self.neurons} needs --adapter-name-or-path or --init test_time")
        self._check_moving()
        told = [*_PLACEMENT, "init_std"] + (["num_registers"] if self.adapter_name_or_path else [])
        if (flags := self._given(told)) and (self.adapter_name_or_path or self.init == "test_time"):
            raise ValueError(
                "an adapter to continue from, or a fit, says how many registers there are, where they enter and what "
                f"they start at; leave out {', '.join(flags)}"
            )
        with warnings.catch_warnings():  # they come when the model gets its registers
            warnings.simplefilter("ignore")
            # What these two need is found later.
            later = self.init in ("test_time", "outliers")
            RegisterConfig(**{**self.registers, "init": "normal" if later else self.init})
            if self.init == "outliers" and self.key_value:
                raise ValueError("--init outliers is for tokens, not for --key-value")

    def _check_moving(self) -> None:
        moving = Moving.parse(self.train)
        about = ["num_registers", "init", "init_std", "neurons", *_PLACEMENT] if not moving.registers else []
        about += ["lora_r", "lora_alpha"] if not moving.lora else []
        if idle := self._given(about):
            raise ValueError(f"--train {self.train} moves nothing that {', '.join(idle)} speaks of")
        if min(self.lora_r, self.lora_alpha) < 1:
            raise ValueError(f"--lora-r and --lora-alpha must be at least 1, got {self.lora_r} and {self.lora_alpha}")

    def _given(self, names: list[str]) -> list[str]:
        """Flags of the fields among ``names`` that are not at their defaults."""
        plain = {item.name: item.default for item in fields(self)}
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != plain[name]]

    @property
    def moving(self) -> dict[str, Any]:
        """What :func:`wrap` is told beside the registers."""
        return {"train": self.train, "lora": {"r": self.lora_r, "lora_alpha": self.lora_alpha}}

    @property
    def registers(self) -> dict[str, Any]:
        """The arguments of :class:`RegisterConfig`."""
        return {name: getattr(self, name) for name in ("num_registers", "init", "init_std", *_PLACEMENT)}
