"""The command ``register-adapter probe``: what tokens know, and what registers do, of a model and of an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..artifacts import audit, resolve_rule
from ..data.datasets import read_image_folder
from ..errors import UnsupportedModelError
from ..evaluation import ProbeReport, RegisterReport, analyse_registers, probe_tokens
from ..testbed import LABELS
from .inputs import load_base, load_pictures, load_processor, with_adapter

__all__ = ["ProbeArguments", "Probed", "print_probes", "run_probes"]

#: Number of made scenes; pictures that the rule is applied to: a share, and at most so many.
_NUM_SCENES, _CUT_SHARE, _MOST_CUT = 3000, 0.2, 512


@dataclass(frozen=True)
class ProbeArguments:
    """What to probe.

    Attributes:
        model: Name or folder of a model of transformers; ``"planted"`` or ``"clean"`` for the shipped ViT.
        images: Folder of pictures, whose sub-folders are classes where there are two or more; ``"scenes"`` for made
            ones.
        output_dir: Folder for ``probes.json`` and ``registers.json``.
        adapter: Folder or name of an adapter, to be probed too.
        rule: Which patch tokens are outliers, see :func:`register_adapter.artifacts.audit`.
        layer: See :func:`register_adapter.artifacts.probe_tokens`, as are all below.
        min_images: Images with outliers that are needed.
        max_images: Use so many pictures, drawn at random; 3000 of the made scenes by default.
        batch_size: Pictures a batch.
        seed: Seed of everything random.
        device: Where to run; default: a GPU if there is one.
        strict: Refuse bad pictures.
    """

    model: str
    images: str
    output_dir: str
    adapter: str | None = None
    rule: str = "auto"
    layer: int = -1
    min_images: int = 100
    max_images: int | None = None
    batch_size: int = 32
    seed: int = 0
    device: str | None = None
    strict: bool = False


class Probed(NamedTuple):
    """What was found of one model; ``registers`` is ``None`` where it has none, and ``note`` says so."""

    name: str
    probes: ProbeReport
    registers: RegisterReport | None
    note: str


@dataclass(frozen=True)
class _Items:
    """Pictures of a data set in an order of one's own, with the labels that ``numbers`` makes of theirs."""

    source: Any
    order: Sequence[int]
    numbers: Mapping[int, int] | None = None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.source[int(self.order[index])]
        if not isinstance(item, dict):
            return {"image": item}
        return {"image": item["image"], **({"label": self.numbers[item["label"]]} if self.numbers else {})}


def run_probes(args: ProbeArguments) -> list[Probed]:
    """Probe the model, and the model with the adapter; write ``probes.json``, and ``registers.json`` if there are any.

    Pictures are drawn in random order. The rule draws its line on the first fifth of them; the rest is probed.

    Raises:
        ValueError, OSError, RegisterAdapterError: As for loading, for :func:`register_adapter.artifacts.audit` and
            :func:`register_adapter.artifacts.probe_tokens`.
    """
    resolve_rule(args.rule)
    source, names = _labelled(args.images, args.max_images)
    order = np.random.default_rng(args.seed).permutation(len(source))[: args.max_images].tolist()
    num_cut = min(max(int(_CUT_SHARE * len(order)), 1), _MOST_CUT)
    if len(order) <= num_cut:
        raise ValueError(f"{len(order)} pictures are too few: some are for the rule, and the others are probed")
    base, processor = load_base(args.model), load_processor(args.model)
    models = {args.model: base}
    if args.adapter is not None:
        models[f"{args.model} + {Path(args.adapter).name or args.adapter}"] = with_adapter(base, args.adapter)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    reading: dict[str, Any] = {"image_processor": processor, "batch_size": args.batch_size, "strict": args.strict}
    own = {number: number for number in range(len(names))} or None
    found = []
    for name, model in models.items():
        model.to(device)
        seen = audit(model, _Items(source, order[:num_cut]), rule=args.rule, attentions=False, **reading)
        probes = probe_tokens(
            model,
            _Items(source, order[num_cut:], own),
            threshold=seen.layers[args.layer].threshold if -len(seen.layers) <= args.layer < len(seen.layers) else None,
            layer=args.layer,
            min_images=args.min_images,
            seed=args.seed,
            progress=True,
            **reading,
        )
        of_head = _Items(source, order[num_cut:], _numbers_of_head(model, names))
        found.append(Probed(name, probes, *_registers(model, of_head, args.seed, reading)))
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "probes.json", {one.name: one.probes.to_dict() for one in found})
    if registers := {one.name: one.registers.to_dict() for one in found if one.registers is not None}:
        _write(out / "registers.json", registers)
    return found


def _labelled(images: str, limit: int | None) -> tuple[Any, Sequence[str]]:
    """The pictures, and the names of their classes if they have any."""
    folder = Path(images)
    if folder.is_dir() and sum(one.is_dir() and not one.name.startswith(".") for one in folder.iterdir()) > 1:
        dataset = read_image_folder(folder)
        return dataset, dataset.features["label"].names
    pictures = load_pictures(images, limit or _NUM_SCENES)
    return pictures, () if isinstance(pictures, list) else LABELS


def _numbers_of_head(model: nn.Module, names: Sequence[str]) -> dict[int, int] | None:
    """The classes' numbers among those of the model's head, ``None`` where it has others."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    own = {str(label): int(number) for number, label in labels.items()}
    return {number: own[name] for number, name in enumerate(names)} if names and set(names) <= set(own) else None


def _registers(
    model: nn.Module, items: _Items, seed: int, reading: dict[str, Any]
) -> tuple[RegisterReport | None, str]:
    try:
        return analyse_registers(model, items, num_maps=2, seed=seed, progress=True, **reading), ""
    except UnsupportedModelError as error:
        return None, str(error)


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", "utf-8")


def print_probes(found: list[Probed], output_dir: str) -> None:
    """Print a table for each model, and one for its registers."""
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def show(title: str, report: ProbeReport | RegisterReport) -> None:
        table = Table(title=title)
        for place, heading in enumerate(report.header):
            table.add_column(heading, justify="right" if place else "left")
        for row in report.cells():
            table.add_row(*row)
        console.print(table)

    for name, probes, registers, note in found:
        show(f"{name}: {probes.num_images} pictures, layer {probes.layer} of {probes.num_layers - 1}", probes)
        for row in probes.rows:
            if row.note:
                console.print(f"{row.tokens}: {row.note}", markup=False)
        if probes.threshold is not None:
            console.print(f"Outliers by the rule {probes.threshold.rule}: {probes.threshold.reason}", markup=False)
        if probes.skipped:
            console.print(f"{len(probes.skipped)} bad pictures were skipped; probes.json names them.")
        if registers is None:
            console.print(f"No register analysis: {note}", markup=False)
            continue
        show(f"{name}: {len(registers.names)} registers, {registers.num_images} pictures", registers)
        for line in registers.notes:
            console.print(line, markup=False)
    console.print(
        "Value ± standard error over test pictures; in brackets the best guess that does not look at the token. "
        "States before the final LayerNorm.",
        style="dim",
    )
    written = "probes.json, registers.json" if any(one.registers for one in found) else "probes.json"
    console.print(f"Written to {output_dir}: {written}", markup=False)
