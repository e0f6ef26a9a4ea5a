"""What the probes found, as a table like table 1 of "Vision Transformers Need Registers" (arXiv 2309.16588)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ...artifacts.rules.threshold import Threshold
from ...utils.files import finite
from ..estimate import Estimate

__all__ = ["COLUMNS", "ProbeReport", "ProbeRow", "Score"]

#: Fields of a row that hold scores, with their headings.
COLUMNS: dict[str, str] = {
    "position_top1": "position top-1 ↑",
    "position_distance": "position distance ↓",
    "reconstruction_l2": "reconstruction L2 ↓",
    "classification": "classification ↑",
}


@dataclass(frozen=True)
class Score:
    """One figure of the table, on test images that no probe was fitted on.

    Attributes:
        estimate: Mean over the test tokens and its standard error over images.
        constant: What the best guess gets that does not look at the token: the commonest place or class of the training
            tokens, the place nearest to all of theirs, their mean pixels.
        num_train: Number of training tokens.
        penalty: Chosen C of the classifier or alpha of the regression.
        converged: Whether the classifier's solver converged.
    """

    estimate: Estimate
    constant: float
    num_train: int
    penalty: float
    converged: bool

    @property
    def value(self) -> float:
        """The figure."""
        return self.estimate.value


@dataclass(frozen=True)
class ProbeRow:
    """One kind of token; a field is ``None`` where it was not measured.

    Attributes:
        tokens: ``"normal"``, ``"outlier"``, ``"CLS"``, ``"register 0"``…
        num_images: Number of images that tokens were drawn from, training and test.
        num_tokens: Number of those tokens.
        position_top1: Share of the tokens whose place in the grid the probe finds.
        position_distance: Mean Euclidean distance of the found place to the true one, in patches.
        reconstruction_l2: Mean L2 norm of the error over all pixel values of a patch, as the model is given them
            (normalised).
        classification: Accuracy of predicting the image's class from one token.
        note: Why something was not measured.
    """

    tokens: str
    num_images: int = 0
    num_tokens: int = 0
    position_top1: Score | None = None
    position_distance: Score | None = None
    reconstruction_l2: Score | None = None
    classification: Score | None = None
    note: str = ""


@dataclass(frozen=True, repr=False)
class ProbeReport:
    """What :func:`register_adapter.artifacts.probe_tokens` found.

    Attributes:
        rows: Normal and outlying patches, CLS, registers.
        difference: Outlier minus normal, by the name of a score, on the same test images; empty without outliers.
        layer: Index into ``hidden_states``: the tokens are read there, before the final LayerNorm.
        num_layers: Number of layers, the input of the first block among them.
        family: Family of the vision tower.
        threshold: Which patch tokens are outliers, by their L2 norm.
        grid: ``(h, w)`` patches, ``None`` where places were not asked for.
        num_images: Number of images that were seen.
        num_patches: Number of their patch tokens.
        num_outliers: Number of outliers among them.
        num_images_with_outliers: Number of images with an outlier (and a normal patch).
        local_probe: Whether position and pixels were learned from each kind's own tokens or from all together.
        seed: Seed of draws and splits.
        skipped: A line for each bad image that was left out.
        definitions: How the figures are defined.
        versions: Versions of the packages.
    """

    rows: list[ProbeRow]
    difference: dict[str, Estimate]
    layer: int
    num_layers: int
    family: str
    threshold: Threshold | None
    grid: tuple[int, int] | None
    num_images: int
    num_patches: int
    num_outliers: int
    num_images_with_outliers: int
    local_probe: str
    seed: int
    skipped: list[str] = field(default_factory=list)
    definitions: dict[str, str] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What was probed, and the table."""
        head = (
            f"<ProbeReport of {self.family}: layer {self.layer} of {self.num_layers - 1}, {self.num_images} images, "
            f"{self.num_outliers} outliers among {self.num_patches} patches"
        )
        return "\n  ".join([head, *(" | ".join(row) for row in (self.header, *self.cells()))]) + ">"

    def row(self, tokens: str) -> ProbeRow:
        """The row of one kind of token.

        Raises:
            KeyError: There is none of that name.
        """
        rows = {row.tokens: row for row in self.rows}
        if tokens not in rows:
            raise KeyError(f"no row {tokens!r}; there are {list(rows)}")
        return rows[tokens]

    @property
    def header(self) -> list[str]:
        """Headings of :meth:`cells`."""
        return ["token", "images", "tokens", *COLUMNS.values()]

    def cells(self) -> list[list[str]]:
        """The table as text: value ± standard error, and in brackets what a guess without the token gets."""
        return [
            [row.tokens, str(row.num_images), str(row.num_tokens), *(_cell(getattr(row, name)) for name in COLUMNS)]
            for row in self.rows
        ]

    def to_markdown(self) -> str:
        """The table in Markdown, with notes below it."""
        lines = [" | ".join(row) for row in (self.header, ["---"] * len(self.header), *self.cells())]
        text = "\n".join(f"| {line} |" for line in lines)
        notes = [f"* {row.tokens}: {row.note}" for row in self.rows if row.note]
        notes += [
            f"* outlier minus normal, {name}: {value.value:+.3f} ± {value.standard_error:.3f}"
            for name, value in self.difference.items()
        ]
        return "\n".join([text, *([""] if notes else []), *notes]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; what is not a finite number is ``None``."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.3f} ± {score.estimate.standard_error:.3f} ({score.constant:.3f})"
