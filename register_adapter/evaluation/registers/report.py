"""What an analysis of registers found; arrays are NumPy's float32."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..estimate import Estimate

__all__ = ["WHY_NOT_ZERO", "Ablation", "Change", "RegisterReport"]

_Array = npt.NDArray[np.float32]

WHY_NOT_ZERO = (
    "Registers are never set to zero here. Their content is close to a constant that the rest of the model relies on "
    "as on a bias (arXiv 2402.17762): zeroing takes that constant away and puts the model outside of what it was made "
    "for, so that it measures the constant and not what registers say about the image. Replacing registers by their "
    "mean, or by another image's, keeps the constant and takes away what is particular to the image. Models keep their "
    "accuracy with registers replaced by the mean, and lose it with zeros (arXiv 2604.14433)."
)


@dataclass(frozen=True)
class Change:
    """How far outputs are from what they were, per image; states behind the last block, before the final LayerNorm.

    Attributes:
        cls: 1 - cosine of the CLS token, ``None`` without one.
        patches: 1 - cosine, mean over the patch tokens of an image.
        cls_relative: L2 norm of the change of CLS over the norm of what it was.
        patches_relative: The same for patches, mean over an image's tokens.
    """

    cls: Estimate | None
    patches: Estimate
    cls_relative: Estimate | None
    patches_relative: Estimate


@dataclass(frozen=True)
class Ablation:
    """What happens when registers hold something else.

    Attributes:
        kind: ``"mean"``: every register's state is replaced by its mean over other images; ``"shuffle"``: by that of
            another image of the batch.
        registers: Numbers of the replaced registers.
        blocks: Blocks at whose input they were replaced.
        change: Of the outputs, against the same model with its own registers.
        accuracy: Accuracy with replaced registers, ``None`` without labels or logits.
        accuracy_change: The same minus the accuracy with the model's own, image by image.
    """

    kind: str
    registers: tuple[int, ...]
    blocks: tuple[int, ...]
    change: Change
    accuracy: Estimate | None = None
    accuracy_change: Estimate | None = None


@dataclass(frozen=True, repr=False)
class RegisterReport:
    """What :func:`register_adapter.artifacts.analyse_registers` found.

    Attributes:
        kind: ``"adapter"`` or ``"native"``.
        family: Family of the vision tower.
        names: What to call the registers, R of them.
        block: The block that ``attention`` is from.
        grid: ``(h, w)`` patches, ``None`` where places are not known.
        attention: ``(B, H, R, h, w)``, attention of every register to the patches, per head, of the first images;
            rows of the softmax over all tokens, not scaled to a sum of one. ``(B, H, R, 1, P)`` without a grid.
        map_similarity: ``(L, R, R)`` cosine between the registers' maps (mean over heads) in every block, mean over
            images; NaN where a register is not in the sequence.
        output_similarity: ``(R, R)`` cosine between the registers behind the last block, before the final LayerNorm,
            mean over images.
        attention_shares: ``(L, R, 3)`` share of a register's attention that goes to patches, CLS and the like, and
            registers; mean over heads and images.
        constancy: ``(L + 1, R)`` squared norm of a register's mean state over the mean of its squared norm, at the
            input of every block and behind the last one: 1 for a register that is the same in all images.
        ablations: Mean and shuffle ablation.
        drift: Of the outputs, against the model without adapters; ``None`` for native registers.
        accuracy: Accuracy with registers as they are, ``None`` without labels or logits.
        num_images: Number of images that everything but means was measured on.
        num_mean_images: Number of other images that means and constancy are from.
        notes: What was not measured, and why.
        skipped: A line for each bad image that was left out.
        why_not_zero: Why there is no zero ablation.
        versions: Versions of the packages.
    """

    kind: str
    family: str
    names: tuple[str, ...]
    block: int
    grid: tuple[int, int] | None
    attention: _Array
    map_similarity: _Array
    output_similarity: _Array
    attention_shares: _Array
    constancy: _Array
    ablations: list[Ablation]
    drift: Change | None
    accuracy: Estimate | None
    num_images: int
    num_mean_images: int
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    why_not_zero: str = WHY_NOT_ZERO
    versions: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What was looked at, and drift and ablations."""
        head = f"<RegisterReport of {self.family}: {len(self.names)} {self.kind} registers, {self.num_images} images"
        return "\n  ".join([head, *(" | ".join(row) for row in (self.header, *self.cells()))]) + ">"

    @property
    def mean_attention(self) -> _Array:
        """``(B, R, h, w)``: the maps, mean over heads."""
        mean: _Array = self.attention.mean(axis=1)
        return mean

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: arrays as lists, NaN as ``None``."""
        plain: dict[str, Any] = _plain(self)
        return plain

    @property
    def header(self) -> list[str]:
        """Headings of :meth:`cells`."""
        changes = ["CLS, 1 - cos", "patches, 1 - cos", "CLS, relative L2", "patches, relative L2"]
        return ["what", "registers", *changes, "accuracy"]

    def cells(self) -> list[list[str]]:
        """Drift and ablations as text: value ± standard error."""
        rows = []
        if self.drift is not None:
            rows.append(_row("drift to the base", "all", self.drift, _text(self.accuracy)))
        for ablation in self.ablations:
            numbers = "all" if len(ablation.registers) == len(self.names) else ", ".join(map(str, ablation.registers))
            accuracy = (
                f"{_text(ablation.accuracy)} (change {_text(ablation.accuracy_change, '+')})"
                if ablation.accuracy
                else "-"
            )
            rows.append(_row(f"{ablation.kind} ablation", numbers, ablation.change, accuracy))
        return rows

    def to_markdown(self) -> str:
        """Ablations and drift, similarities, and notes in Markdown."""
        lines = [f"| {' | '.join(row)} |" for row in (self.header, ["---"] * len(self.header), *self.cells())]
        lines += ["", f"| behind the last block, cosine | {' | '.join(self.names)} | constancy |"]
        lines.append("| --- " * (len(self.names) + 2) + "|")
        for name, row, constant in zip(self.names, self.output_similarity, self.constancy[-1], strict=True):
            lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} | {constant:.3f} |")
        return "\n".join([*lines, "", *(f"* {note}" for note in (*self.notes, self.why_not_zero))]) + "\n"


def _row(what: str, registers: str, change: Change, accuracy: str) -> list[str]:
    figures = (change.cls, change.patches, change.cls_relative, change.patches_relative)
    return [what, registers, *map(_text, figures), accuracy]


def _text(estimate: Estimate | None, sign: str = "") -> str:
    return "-" if estimate is None else f"{estimate.value:{sign}.4f} ± {estimate.standard_error:.4f}"


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
