"""The shape of a detector, checked before anything is made from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .features import KINDS

__all__ = ["MAX_PARAMETERS", "DetectorConfig"]

#: A detector is no larger than this.
MAX_PARAMETERS = 200_000
_WIDEST, _NARROWEST = 48, 4


@dataclass(frozen=True)
class DetectorConfig:
    """The shape of a detector; it fits models with the same numbers of blocks and heads and the same kinds of tokens.

    Attributes:
        blocks: Number L of blocks of the model.
        heads: Number H of heads.
        kinds: What is read of the attention of a patch, of :data:`register_adapter.artifacts.detector.KINDS`.
        width: Channels of the network; 0 takes the largest multiple of 4 up to 48 that keeps it small enough.
        depth: Number of 3 × 3 convolutions: a patch is predicted from up to ``depth`` patches away.
        degrees: Degrees of freedom of the Student-t distribution of a value. A low number lets an outlier be one.
        threshold: Scores above it are outliers; infinity where the rule found no two kinds of patches.
        rule: The rule that the threshold is from, and its reason.

    Raises:
        ValueError: A value is of the wrong type or out of range, or the network would be too large.
    """

    blocks: int
    heads: int
    kinds: tuple[str, ...]
    width: int = 0
    depth: int = 3
    degrees: float = 4.0
    threshold: float = math.inf
    rule: str = ""

    def __post_init__(self) -> None:
        for name, least in (("blocks", 1), ("heads", 1), ("width", 0), ("depth", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name in ("degrees", "threshold"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not value > 0:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        if not isinstance(self.rule, str):
            raise ValueError(f"rule must be a text, got {self.rule!r}")
        if not self.kinds or any(kind not in KINDS for kind in self.kinds) or len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds must be some of {', '.join(KINDS)}, each once, got {self.kinds!r}")
        if not self.width:
            # Resolved once: what is saved is what was made.
            object.__setattr__(self, "width", self._widest())
        elif self.num_parameters(self.width) > MAX_PARAMETERS:
            raise ValueError(
                f"width={self.width} and depth={self.depth} make {self.num_parameters(self.width)} parameters, and "
                f"{MAX_PARAMETERS} are allowed; give width=0 to have it chosen"
            )

    @property
    def channels(self) -> int:
        """Values C per patch: blocks × heads × kinds."""
        return self.blocks * self.heads * len(self.kinds)

    def num_parameters(self, width: int) -> int:
        """Number of the network's parameters at a width."""
        enter = (self.channels + 2) * width
        convolutions = self.depth * (9 * (width + 1) * width + 3 * width)
        return enter + convolutions + 2 * self.channels * (width + 1) + self.channels

    def _widest(self) -> int:
        for width in range(_WIDEST, _NARROWEST - 1, -4):
            if self.num_parameters(width) <= MAX_PARAMETERS:
                return width
        raise ValueError(
            f"{self.blocks} blocks with {self.heads} heads are {self.channels} values per patch, too many for a "
            f"detector of {MAX_PARAMETERS} parameters with depth={self.depth}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a threshold that is infinite is ``None``."""
        return {
            **asdict(self),
            "kinds": list(self.kinds),
            "threshold": None if math.isinf(self.threshold) else self.threshold,
        }

    @classmethod
    def from_dict(cls, values: Any) -> DetectorConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: A key is missing or unknown, or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != known:
            keys = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"a detector's config must have the keys {', '.join(sorted(known))}, got {keys}")
        kinds, threshold = values["kinds"], values["threshold"]
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f"kinds must be a list of names, got {kinds!r}")
        return cls(**{**values, "kinds": tuple(kinds), "threshold": math.inf if threshold is None else threshold})
