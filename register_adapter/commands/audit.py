"""The command ``register-adapter audit``: a model and each of its adapters, side by side over the same pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..artifacts import ArtifactReport, LayerReport, audit, resolve_rule
from ..data.images import check_image
from ..errors import UnsupportedModelError
from .inputs import load_base, load_pictures, load_processor, with_adapter

__all__ = ["AuditArguments", "print_reports", "run_audit"]

_SHOWN = 4


@dataclass(frozen=True)
class AuditArguments:
    """What to audit.

    Attributes:
        model: Name or folder of a model of transformers; ``"planted"`` or ``"clean"`` for the shipped ViT.
        images: Folder of pictures; ``"scenes"`` for made ones.
        output_dir: Folder for ``audit.json`` and ``index.html``.
        adapters: Folders or names of adapters; each is audited on its own.
        rule: See :func:`register_adapter.artifacts.audit`, as are all below.
        attentions: Attention statistics.
        batch_size: Pictures a batch.
        max_images: Use the first so many; 256 of the made scenes by default.
        device: Where to run; default: a GPU if there is one.
        strict: Refuse bad pictures.
    """

    model: str
    images: str
    output_dir: str = "report"
    adapters: Sequence[str] = field(default_factory=tuple)
    rule: str = "auto"
    attentions: bool = True
    batch_size: int = 32
    max_images: int | None = None
    device: str | None = None
    strict: bool = False


def run_audit(args: AuditArguments) -> tuple[list[ArtifactReport], str | None]:
    """Audit the model and every adapter, and write ``audit.json`` and ``index.html``.

    Returns:
        The reports, the base model's first, and why the page has no pictures, if it has none.

    Raises:
        ValueError, OSError, RegisterAdapterError: As for loading, and for :func:`register_adapter.artifacts.audit`.
    """
    resolve_rule(args.rule)
    images = load_pictures(args.images, args.max_images)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(args.model)
    processor = load_processor(args.model)
    models: dict[str, nn.Module] = {args.model: base}
    for adapter in args.adapters:
        name = Path(adapter).name or adapter
        models[name if name not in models else adapter] = with_adapter(base, adapter)
    reports = []
    for name, model in models.items():
        report = audit(
            model.to(device),
            images,
            image_processor=processor,
            rule=args.rule,
            attentions=args.attentions,
            batch_size=args.batch_size,
            max_images=args.max_images,
            name=name,
            strict=args.strict,
        )
        reports.append(report)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    written = json.dumps({"reports": [report.to_dict() for report in reports]}, indent=1, allow_nan=False)
    (out / "audit.json").write_text(written + "\n", "utf-8")
    return reports, _write_page(out / "index.html", reports, models, images, processor)


def _write_page(
    path: Path, reports: list[ArtifactReport], models: dict[str, nn.Module], images: Any, processor: Any
) -> str | None:
    from ..viz import PictureError, read_examples, write_page

    items = (item["image"] if isinstance(item, dict) else item for item in images)
    pictures: list[Any] = []
    for item in items:
        if check_image(item) is None:
            pictures.append(item)
        if len(pictures) == _SHOWN:
            break
    examples, why = [], None
    try:
        examples = read_examples(models, pictures, image_processor=processor)
    except (UnsupportedModelError, PictureError) as error:
        why = str(error)
    write_page(path, reports, examples)
    return why


def print_reports(reports: list[ArtifactReport], output_dir: str, no_pictures: str | None = None) -> None:
    """Print a table for each report, and its verdict."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for report in reports:
        table = Table(title=f"{report.name}: {report.num_images} pictures, rule {report.rule}")
        table.add_column("layer", justify="right")
        for heading in ("median norm", "largest / median", "outlier patches", "line", "attention to outliers"):
            table.add_column(heading, justify="right")
        for layer in report.layers:
            table.add_row(*_cells(layer), style="bold" if layer.threshold.separated and layer.layer else None)
        console.print(table)
        console.print(f"Verdict: [bold]{report.verdict}[/bold]")
        console.print(report.reason, markup=False)
        if skipped := report.environment.get("skipped"):
            console.print(f"{len(skipped)} bad pictures were skipped; audit.json names them.")
    console.print(
        "L2 norms of patch tokens, before the final LayerNorm; layer 0 is the input of the first block and decides "
        "nothing. Attention: mean over heads and queries, in the block that reads the layer.",
        style="dim",
    )
    if no_pictures:
        console.print(f"The page has no pictures: {no_pictures}", markup=False)
    console.print(f"Written to {output_dir}: audit.json, index.html", markup=False)


def _cells(layer: LayerReport) -> tuple[str, ...]:
    quantiles = layer.norms["patch"].quantiles
    median = quantiles["0.5"]
    lines = [f"> {layer.threshold.high:.4g}"] if layer.threshold.high != float("inf") else []
    lines += [f"< {layer.threshold.low:.4g}"] if layer.threshold.low else []
    attention = "-"
    if layer.attention is not None:
        shares = layer.attention.from_all["outlier"]
        attention = f"{sum(shares) / len(shares):.1%}"
    return (
        str(layer.layer),
        f"{median:.4g}",
        f"{quantiles['1'] / max(median, 1e-30):.2f}",
        f"{layer.outlier_share:.2%}",
        ", ".join(lines) or "-",
        attention,
    )
