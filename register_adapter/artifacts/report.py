"""What an audit found, layer by layer; numbers only, ready for JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..utils.arguments import check_fields
from ..utils.files import parse_json, read_text
from ..utils.staging import write_text
from .rules.threshold import Threshold
from .sink_report import SinkKind, SinkReport

__all__ = [
    "FAR_ABOVE",
    "FAR_BELOW",
    "KIND_WORDS",
    "MOST",
    "ArtifactReport",
    "AttentionShares",
    "Evidence",
    "GatheredAttention",
    "LayerReport",
    "MassiveChannel",
    "NormDistribution",
    "TokenKind",
    "Verdict",
]

#: Share of a block's attention that counts as most of it.
MOST = 0.5
#: Values at most so many times the others' are far below them (no-op), at least so many times far above (broadcast).
FAR_BELOW, FAR_ABOVE = 0.5, 2.0
#: What a verdict rests on.
Evidence = Literal["norms", "attention", "both"]
#: Kind of patches that draw attention -> in words.
KIND_WORDS: dict[SinkKind, str] = {
    "no-op": "a no-op: attention is parked where next to nothing is read",
    "broadcast": "a broadcast: all tokens read much of the same patches",
    "unclear": "neither no-op nor broadcast",
}
#: ``"none"``, ``"present"`` (at the last block's output), ``"present inside only"`` (gone there).
Verdict = Literal["none", "present", "present inside only"]
#: Kinds of tokens: patches, CLS and the like (distillation token), registers (native ones and adapters').
TokenKind = Literal["patch", "cls", "register"]


@dataclass(frozen=True)
class NormDistribution:
    """L2 norms of one kind of token at one layer, before the final LayerNorm.

    Attributes:
        count: Number of tokens.
        mean: Their mean.
        std: Their standard deviation.
        quantiles: From the quantile's name (``"0.5"``) to its value; the sketch's relative error is in the report.
        edges: ``(bins + 1,)`` edges of the histogram, evenly spaced in log2; only the part that is not empty.
        counts: ``(bins,)`` tokens in each bin.
    """

    count: int
    mean: float
    std: float
    quantiles: dict[str, float]
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class MassiveChannel:
    """A channel with an activation far beyond the usual ("Massive Activations in LLMs", arXiv 2402.17762).

    Attributes:
        channel: Index into D.
        largest: Largest |activation| over the patch tokens.
        over_median: The same over the median over channels of their largest |activation|.
    """

    channel: int
    largest: float
    over_median: float


@dataclass(frozen=True)
class AttentionShares:
    """Share of the attention that each kind of token receives in one block, a value a head ``(H,)``.

    Shares of outliers and other patches, CLS and registers sum to one (but for key/value pairs).

    Attributes:
        from_all: Mean over all queries; keys ``"outlier"``, ``"other"``, ``"cls"``, ``"register"``.
        from_cls: Of the CLS query alone; ``None`` where there is no CLS.
    """

    from_all: dict[str, list[float]]
    from_cls: dict[str, list[float]] | None


@dataclass(frozen=True)
class GatheredAttention:
    """The patches of one block that each receive at least five times an even share of its attention.

    Attributes:
        patches: Their share of all patches.
        attention: Share of the attention that they receive together, mean over heads and queries.
        norm_ratio: Geometric mean of their norms over that of the other patches, where the block reads them; ``None``
            where there are none.
        value_ratio: The same of the norms of their values, head by head: geometric mean over the heads, weighted by the
            attention that they receive there. ``None`` where values are not known.
    """

    patches: float
    attention: float
    norm_ratio: float | None
    value_ratio: float | None = None

    @property
    def kind(self) -> SinkKind:
        """What they do, by the norms of their values."""
        if self.value_ratio is None:
            return "unclear"
        return "no-op" if self.value_ratio <= FAR_BELOW else "broadcast" if self.value_ratio >= FAR_ABOVE else "unclear"

    @property
    def telling(self) -> bool:
        """Whether they are artifacts by what they do: they take most of the attention, with values far off."""
        return self.attention >= MOST and self.kind != "unclear"


@dataclass(frozen=True)
class LayerReport:
    """One layer: index 0 is the input of the first block, ``i + 1`` the output of block ``i``; L2 norms, no LayerNorm.

    Attributes:
        layer: The index, as into ``hidden_states``.
        norms: One entry a kind of token that the model has.
        threshold: What the audit's rule says about the patch norms here.
        outlier_share: Share of all patch tokens that are outliers by ``threshold``.
        low_share: Share of them below ``threshold.low``; the rest is above ``threshold.high``.
        images_with_outliers: Share of the images with at least one.
        per_image_mean: Mean over images of the number of outliers.
        per_image_std: Standard deviation over images of that number.
        massive_channels: Largest first, at most eight.
        similarity: Mean cosine of a patch to its up to 4 neighbours right after the patch embedding, by key
            ``"outlier"`` and ``"other"``; ``None`` where places are not known.
        border_distance: Mean distance to the nearest border, in patches, 0 at the border; same keys.
        position_map: ``(h, w)``, share of the images in which the patch at that place is an outlier.
        recurrence: Chance that an outlier's place is an outlier in another image, over the mean share (1: no memory of
            the place).
        attention: Attention that these tokens receive in the block that reads them (block ``layer``); ``None`` behind
            the last block, and without attention statistics.
        gathered: The patches that draw attention in that block, whatever their norms; ``None`` as for ``attention``.
    """

    layer: int
    norms: dict[str, NormDistribution]
    threshold: Threshold
    outlier_share: float
    low_share: float
    images_with_outliers: float
    per_image_mean: float
    per_image_std: float
    massive_channels: list[MassiveChannel]
    similarity: dict[str, float] | None
    border_distance: dict[str, float] | None
    position_map: list[list[float]] | None
    recurrence: float | None
    attention: AttentionShares | None
    gathered: GatheredAttention | None = None


@dataclass(frozen=True, repr=False)
class ArtifactReport:
    """What :func:`register_adapter.artifacts.audit` found.

    Attributes:
        name: What to call the model.
        verdict: See :data:`Verdict`.
        reason: Why, in a sentence or two.
        first_layer: First layer where outliers separate and stay, ``None`` without any.
        layers: One entry a layer, input of the first block first.
        rule: The rule that the thresholds are from.
        family: Family of the vision tower.
        num_images: Number of images.
        num_registers: Registers of active adapters.
        native_registers: Registers that the model was made with.
        grid: ``(h, w)`` patches, ``None`` where places are not known.
        relative_error: Of the norm sketch: half the width of a bin.
        definitions: How every figure is defined: which norm, which layer, which rule.
        environment: Versions, hardware, commit, seconds.
        sinks: Attention sinks head by head; ``None`` if they were not asked for.
        evidence: What the verdict rests on, ``None`` where it is ``"none"``.
        kind: What the patches that draw most of the attention do; ``None`` where none do in any block but the first.
    """

    name: str
    verdict: Verdict
    reason: str
    first_layer: int | None
    layers: list[LayerReport]
    rule: str
    family: str
    num_images: int
    num_registers: int
    native_registers: int
    grid: tuple[int, int] | None
    relative_error: float
    definitions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    sinks: SinkReport | None = None
    evidence: Evidence | None = None
    kind: SinkKind | None = None

    @property
    def most_outlying(self) -> LayerReport | None:
        """The layer with most outliers, from ``first_layer`` on; ``None`` where no line was drawn between norms."""
        if self.verdict == "none" or self.first_layer is None:
            return None
        separated = [layer for layer in self.layers[self.first_layer :] if layer.threshold.separated]
        return max(separated, key=lambda layer: layer.outlier_share)

    @property
    def most_gathered(self) -> LayerReport | None:
        """The layer whose block gives most attention to few patches; ``None`` without attention statistics."""
        layers = [layer for layer in self.layers if layer.gathered is not None]
        return max(layers, key=lambda layer: layer.gathered.attention if layer.gathered else 0.0, default=None)

    @property
    def most_telling(self) -> LayerReport | None:
        """The layer, but for the first, with most attention to patches that are artifacts by what they do in it."""
        layers = [layer for layer in self.layers[1:] if layer.gathered is not None and layer.gathered.telling]
        return max(layers, key=lambda layer: layer.gathered.attention if layer.gathered else 0.0, default=None)

    @property
    def unexplained(self) -> bool:
        """Whether the verdict is ``"none"`` although a few patches draw most of the attention of a block."""
        layer = self.most_gathered
        gathered = layer.gathered if layer is not None else None
        return self.verdict == "none" and gathered is not None and gathered.attention >= MOST

    @property
    def summary(self) -> str:
        """The verdict in a few words, with its evidence; never a bare ``none`` where few patches draw the attention."""
        if self.unexplained:
            return f"{self.verdict} by norms, but a few patches draw most of the attention"
        if self.evidence is None:
            return self.verdict
        by = "norms and attention" if self.evidence == "both" else self.evidence
        return f"{self.verdict}, by {by}{f' ({self.kind})' if self.kind is not None else ''}"

    def __repr__(self) -> str:
        """The verdict and why; all figures are in ``layers``, and in :meth:`to_dict`."""
        return (
            f"<ArtifactReport of {self.name}: {self.summary}; {self.num_images} images, {len(self.layers)} layers, "
            f"rule {self.rule}. {self.reason}>"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists and dictionaries, ready for strict JSON: an infinite threshold becomes ``None``."""
        values = asdict(self)
        for layer in values["layers"]:
            if math.isinf(layer["threshold"]["high"]):
                layer["threshold"]["high"] = None
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ArtifactReport:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: A field is missing, holds what it cannot, or there is one that a report does not have.
            ValueError: There is no layer, ``first_layer`` is none of them, or one lacks norms of patches.
        """
        grid, sinks = values.get("grid"), values.get("sinks")
        layers = [_layer(layer) for layer in values.get("layers", [])]
        read = {
            "grid": None if grid is None else tuple(grid),
            "layers": layers,
            "sinks": None if sinks is None else SinkReport.from_dict(sinks),
        }
        report = cls(**{**values, **read})
        check_fields("report", report)
        if not 0 <= (report.first_layer or 0) < len(layers):
            raise ValueError(f"first_layer is {report.first_layer!r:.40}, and the report has {len(layers)} layers")
        for number, layer in enumerate(layers):
            if "patch" not in layer.norms or any({"0.5", "1"} - {*norms.quantiles} for norms in layer.norms.values()):
                raise ValueError(f"layers[{number}].norms of the report lacks patches, or the quantiles 0.5 and 1")
        return report

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all, and return the path; folders are made.

        Raises:
            OSError: It cannot be written; what was there before is untouched.
        """
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> ArtifactReport:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: There is no such file.
            ValueError: It is not JSON, or see :meth:`from_dict`.
            TypeError: It is not a report.
        """
        return cls.from_dict(parse_json(read_text(path)))


def _layer(values: dict[str, Any]) -> LayerReport:
    threshold, attention, gathered = dict(values["threshold"]), values["attention"], values.get("gathered")
    if threshold["high"] is None:
        threshold["high"] = math.inf
    return LayerReport(
        **{
            **values,
            "norms": {kind: NormDistribution(**norms) for kind, norms in values["norms"].items()},
            "threshold": Threshold(**threshold),
            "massive_channels": [MassiveChannel(**channel) for channel in values["massive_channels"]],
            "attention": None if attention is None else AttentionShares(**attention),
            "gathered": None if gathered is None else GatheredAttention(**gathered),
        }
    )
