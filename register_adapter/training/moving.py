"""What may move in a run: registers, and a small and explicit set of other parts, each by a method of PEFT's."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peft import LNTuningConfig, LoraConfig, PeftConfig, PeftModel
from torch import nn

from ..towers.tower import Tower, find_tower
from ..tuner.composed import compose
from ..tuner.config import RegisterConfig
from ..tuner.peft_model import add_registers
from ..tuner.positions import PositionConfig

__all__ = ["PARTS", "Moving", "put_on"]

#: Names of the adapters in a model where several parts move.
REGISTERS, LORA, COPIES, POSITIONS = "registers", "lora", "copies", "positions"
_SWITCHES = ("registers", "gates", "lora", "positions", "patch_embedding", "norms")
#: What can move, for help and messages.
PARTS = f"{', '.join(_SWITCHES)}, last_blocks=N"


@dataclass(frozen=True)
class Moving:
    """What of a model is trained, as ``--train registers+lora+last_blocks=2`` says it.

    Attributes:
        registers: Register tokens.
        gates: A learned bias on the registers' attention logits, in every block.
        lora: LoRA on every linear layer of the tower's blocks.
        positions: Offsets, zero at first, that are added to the learned position embeddings.
        patch_embedding: The convolution that embeds patches, as a whole.
        norms: Every LayerNorm of the tower, as a whole.
        last_blocks: Every layer of this many blocks at the end, as a whole.
    """

    registers: bool = False
    gates: bool = False
    lora: bool = False
    positions: bool = False
    patch_embedding: bool = False
    norms: bool = False
    last_blocks: int = 0

    def __post_init__(self) -> None:
        if self.gates and not self.registers:
            raise ValueError("gates are the registers': train registers+gates")
        if not any(asdict(self).values()):
            raise ValueError("nothing may move; name what is trained, such as registers")

    @classmethod
    def parse(cls, text: str) -> Moving:
        """Read what ``str()`` writes: names joined by ``+``.

        Raises:
            ValueError: A name is unknown, stands twice, or has no number where it needs one.
        """
        given: dict[str, Any] = {}
        for word in text.replace(" ", "").split("+"):
            name, _, number = word.partition("=")
            if name in given:
                raise ValueError(f"{name!r} stands twice in {text!r}")
            if name in _SWITCHES and not number:
                given[name] = True
            elif name == "last_blocks" and number.isdecimal() and int(number) > 0:
                given[name] = int(number)
            else:
                raise ValueError(f"cannot train {word!r}; name any of {PARTS}, joined by +, such as registers+lora")
        return cls(**given)

    def __str__(self) -> str:
        parts = [name for name in _SWITCHES if getattr(self, name)]
        return "+".join([*parts, *([f"last_blocks={self.last_blocks}"] if self.last_blocks else [])])

    @property
    def alone(self) -> bool:
        """Whether registers (and their gates) are all that moves."""
        others = (self.lora, self.positions, self.patch_embedding, self.norms, self.last_blocks)
        return self.registers and not any(others)


def put_on(
    base: nn.Module,
    moving: Moving,
    registers: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    modules_to_save: Iterable[str] = (),
) -> PeftModel:
    """Put what is trained on a base model, which is frozen otherwise.

    Args:
        base: The base model.
        moving: What is trained.
        registers: Arguments of :class:`RegisterConfig`.
        lora: Arguments of ``peft.LoraConfig``; default rank 8, alpha 16.
        modules_to_save: Heads that are trained beside it.

    Returns:
        A :class:`RegisterPeftModel` if only registers move, otherwise a :class:`ComposedPeftModel`, whose adapters are
        called ``registers``, ``lora``, ``positions`` and ``copies``.

    Raises:
        ValueError: The tower has none of what is named.
        UnsupportedModelError: The model has no single vision tower.
    """
    options = dict(registers or {})
    if moving.gates and options.get("gate") is None:
        options["gate"] = -5.0
    heads = list(modules_to_save)
    if moving.alone:
        return add_registers(base, **{**options, **({"modules_to_save": heads} if heads else {})})
    tower = find_tower(base, options.get("target_modules"))
    configs: dict[str, PeftConfig] = {}
    if moving.positions:
        configs[POSITIONS] = PositionConfig(target_modules=options.get("target_modules"))
    copied = _copied(tower, moving)
    # Before the registers, whose hooks would be copied with a module.
    if copied:
        configs[COPIES] = LNTuningConfig(target_modules=_suffixes(base, tower, copied))
    if moving.lora:
        linear = [name for name, part in _leaves(tower) if isinstance(part, nn.Linear) and name not in copied]
        targets = _suffixes(base, tower, [name for name in linear if name.startswith(f"{_blocks_path(tower)}.")])
        configs[LORA] = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": targets, **(lora or {})})
    if moving.registers:
        configs[REGISTERS] = RegisterConfig(**options)
    if heads:
        next(reversed(configs.values())).modules_to_save = heads
    with warnings.catch_warnings():
        # PEFT's tuned layer norms copy any layer, and warn of those that are not linear.
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        return compose(base, configs)


def _leaves(tower: Tower) -> Iterator[tuple[str, nn.Module]]:
    """The tower's modules that have parameters of their own and no modules inside."""
    for name, part in tower.module.named_modules():
        if not any(True for _ in part.children()) and any(True for _ in part.parameters()):
            yield name, part


def _blocks_path(tower: Tower) -> str:
    blocks = tower.part("blocks")
    return str(next(name for name, part in tower.module.named_modules() if part is blocks))


def _copied(tower: Tower, moving: Moving) -> list[str]:
    """Names, in the tower, of the modules that are trained as a whole."""
    chosen: list[str] = []
    leaves = dict(_leaves(tower))
    if moving.patch_embedding:
        part = tower.part("patch_embedding")
        names = [name for name, module in leaves.items() if module is part]
        if not names:
            raise ValueError(f"{type(tower.module).__name__} has no patch embedding that is one module")
        chosen += names
    if moving.norms:
        chosen += [name for name, part in leaves.items() if "norm" in type(part).__name__.lower()]
    if moving.last_blocks:
        count = len(tower.part("blocks"))
        if moving.last_blocks > count:
            raise ValueError(f"last_blocks={moving.last_blocks} of {count} blocks")
        path = _blocks_path(tower)
        starts = tuple(f"{path}.{index}." for index in range(count - moving.last_blocks, count))
        chosen += [name for name in leaves if name.startswith(starts)]
    return list(dict.fromkeys(chosen))


def _suffixes(base: nn.Module, tower: Tower, names: list[str]) -> list[str]:
    """Names that PEFT finds in this model and in any other with the same tower, and nowhere outside the tower."""
    start = f"{tower.path}." if tower.path else ""
    own = {start + name for name in names}
    others = [name for name, _ in base.named_modules() if name not in own]

    def free(name: str) -> bool:
        return not any(other == name or other.endswith(f".{name}") for other in others)

    return [name if free(name) else start + name for name in names]
