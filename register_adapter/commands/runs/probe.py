"""What tokens hold, and what registers do, in a model and in the same model with an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ...artifacts import audit, resolve_rule
from ...data.folders import read_image_folder
from ...errors import UnsupportedModelError
from ...evaluation import ProbeReport, RegisterReport, analyse_registers, probe_tokens
from ...features.passes import resolve_layer
from ...testbed import LABELS, SceneDataset
from ...towers.tower import find_tower
from ...utils.staging import check_target, staged
from .inputs import adapter_name, choose_device, load_base, load_images, load_processor, with_adapter

__all__ = ["ProbeArguments", "Probed", "run_probes", "to_dict"]

#: Number of drawn scenes; images that the rule is applied to: a share, and at most so many.
_NUM_SCENES, _RULE_SHARE, _MOST_FOR_RULE = 3000, 0.2, 512


@dataclass(frozen=True)
class ProbeArguments:
    """What to probe.

    Attributes:
        model: Name or folder of a model of transformers, or a word for what is packaged, such as ``"grown"``.
        images: Folder of images, whose sub-folders are classes where there are two or more; ``"scenes"``, or
            ``"mosaics"`` and ``"tiles"``, which have no classes, for images that the package draws.
        output_dir: Folder for ``probes.json`` and ``registers.json``.
        adapter: Folder or name of an adapter, to be probed too.
        rule: Which patch tokens are outliers, see :func:`register_adapter.artifacts.audit`.
        layer: See :func:`register_adapter.evaluation.probe_tokens`, as are all below.
        min_images: Images with outliers that are needed.
        max_images: Use so many images, at random; 3000 of the drawn scenes by default.
        batch_size: Images per batch.
        seed: Seed of everything random.
        device: Where to run; default: a GPU if there is one.
        strict: Refuse bad images.
        progress: Show bars.
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
    progress: bool = True


class Probed(NamedTuple):
    """The probes of one model and of its registers, ``None`` where it has none; ``note`` then says why."""

    name: str
    probes: ProbeReport
    registers: RegisterReport | None
    note: str


@dataclass(frozen=True)
class _Items:
    """Images of a data set in an order of one's own; ``numbers`` maps its labels, and without it there are none."""

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


@dataclass(frozen=True)
class _Data:
    """A data set, the names of its classes (none: no labels), and the items for the rule and for the probes."""

    source: Any
    classes: Sequence[str]
    for_rule: Sequence[int]
    rest: Sequence[int]


def run_probes(args: ProbeArguments) -> list[Probed]:
    """Probe the model, and the model with the adapter; write ``probes.json``, and ``registers.json`` if there are any.

    Images are drawn in random order. The rule chooses the threshold on the first fifth of them; the rest is probed.

    Raises:
        ValueError, OSError, RegisterAdapterError: As for loading, for :func:`register_adapter.artifacts.audit` and
            :func:`register_adapter.evaluation.probe_tokens`.
    """
    check_target(args.output_dir, args.images, files=("probes.json", "registers.json"))
    resolve_rule(args.rule)
    data = _draw(args)
    base, processor = load_base(args.model), load_processor(args.model)
    resolve_layer(find_tower(base), args.layer)
    models = {args.model: base}
    if args.adapter is not None:
        models[f"{args.model} + {adapter_name(args.adapter)}"] = with_adapter(base, args.adapter)
    probed = [_probe(name, model, data, processor, args) for name, model in models.items()]
    with staged(args.output_dir) as folder:
        for kind, reports in to_dict(probed).items():
            if reports:
                (folder / f"{kind}.json").write_text(json.dumps(reports, indent=1, allow_nan=False) + "\n", "utf-8")
    if all(model.registers is None for model in probed):  # an earlier run's are of another model than the probes now
        Path(args.output_dir, "registers.json").unlink(missing_ok=True)
    return probed


def to_dict(probed: Sequence[Probed]) -> dict[str, dict[str, Any]]:
    """``"probes"`` and ``"registers"``, each from a model's name to its report, ready for JSON."""
    return {
        "probes": {model.name: model.probes.to_dict() for model in probed},
        "registers": {model.name: model.registers.to_dict() for model in probed if model.registers is not None},
    }


def _probe(name: str, model: nn.Module, data: _Data, processor: Any, args: ProbeArguments) -> Probed:
    """Choose the threshold on some images, and probe the model and its registers on the rest."""
    model.to(choose_device(args.device))
    reading: dict[str, Any] = {"image_processor": processor, "batch_size": args.batch_size, "strict": args.strict}
    reading["progress"] = args.progress
    audited = audit(model, _Items(data.source, data.for_rule), rule=args.rule, attentions=False, **reading)
    layers = audited.layers
    probes = probe_tokens(
        model,
        _Items(data.source, data.rest, {number: number for number in range(len(data.classes))} or None),
        threshold=layers[args.layer].threshold,
        layer=args.layer,
        min_images=args.min_images,
        seed=args.seed,
        **reading,
    )
    probes = replace(probes, skipped=[*audited.environment["skipped"], *probes.skipped])
    items = _Items(data.source, data.rest, _numbers_of_head(model, data.classes))
    try:
        registers = analyse_registers(model, items, num_maps=2, seed=args.seed, **reading)
    except UnsupportedModelError as error:
        return Probed(name, probes, None, str(error))
    return Probed(name, probes, registers, "")


def _draw(args: ProbeArguments) -> _Data:
    """The images in random order, and the names of their classes if they have any."""
    folder = Path(args.images)
    classes: Sequence[str] = ()
    inside = folder.iterdir() if args.images and folder.is_dir() else ()
    if sum(path.is_dir() and not path.name.startswith(".") for path in inside) > 1:
        source: Any = read_image_folder(folder)
        classes = source.features["label"].names
    else:
        source = load_images(args.images, args.max_images or _NUM_SCENES)
        classes = LABELS if isinstance(source, SceneDataset) else ()
    order = np.random.default_rng(args.seed).permutation(len(source))[: args.max_images].tolist()
    num_for_rule = min(max(int(_RULE_SHARE * len(order)), 1), _MOST_FOR_RULE)
    if len(order) <= num_for_rule:
        raise ValueError(f"{len(order)} images are too few: some are for the rule, and the others are probed")
    return _Data(source, classes, order[:num_for_rule], order[num_for_rule:])


def _numbers_of_head(model: nn.Module, classes: Sequence[str]) -> dict[int, int] | None:
    """The numbers of the classes in the model's head, ``None`` where it has other ones."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    own = {str(label): int(number) for number, label in labels.items()}
    return {number: own[name] for number, name in enumerate(classes)} if classes and set(classes) <= set(own) else None
