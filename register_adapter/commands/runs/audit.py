"""An audit of a model and each of its adapters, side by side over the same images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import nn

from ...artifacts import ArtifactReport, audit, resolve_rule
from ...data.images import check_image
from ...errors import UnsupportedModelError
from ...utils.staging import check_target, staged
from ...viz import Example, ImageInputError, read_examples, write_page
from ...viz.page import Origin
from .inputs import choose_device, load_images, load_models, load_processor
from .launched import is_main_process, num_processes, own_device

__all__ = ["AuditArguments", "run_audit"]

_SHOWN = 4


@dataclass(frozen=True)
class AuditArguments:
    """What to audit.

    Attributes:
        model: Name or folder of a model of transformers, or a word for what is packaged, such as ``"grown"``.
        images: Folder of images; ``"scenes"`` for images that the package draws.
        output_dir: Folder for ``audit.json`` and ``index.html``.
        adapters: Folders or names of adapters; each is audited on its own.
        rule: See :func:`register_adapter.artifacts.audit`, as are all below.
        attentions: Attention statistics.
        sinks: Attention sinks, which need attention statistics.
        batch_size: Images per batch.
        max_images: Use the first so many; 256 of the drawn scenes by default.
        device: Where to run; default: a GPU if there is one.
        strict: Refuse bad images.
        progress: Show bars.
    """

    model: str
    images: str
    output_dir: str = "report"
    adapters: Sequence[str] = field(default_factory=tuple)
    rule: str = "auto"
    attentions: bool = True
    sinks: bool = False
    batch_size: int = 32
    max_images: int | None = None
    device: str | None = None
    strict: bool = False
    progress: bool = True


def run_audit(args: AuditArguments) -> tuple[list[ArtifactReport], str | None]:
    """Audit the model and every adapter, and write ``audit.json`` and ``index.html``.

    The processes of ``accelerate launch -m register_adapter audit`` share the images, and the main one writes.

    Returns:
        The reports, the base model's first, and why the page has no images, if it has none.

    Raises:
        ValueError, OSError, RegisterAdapterError: As for loading, and for :func:`register_adapter.artifacts.audit`.
    """
    check_target(args.output_dir, files=("audit.json", "index.html"))
    resolve_rule(args.rule)
    if args.sinks and not args.attentions:
        raise ValueError("sinks are told by attention maps: give --sinks or --no-attentions, not both")
    images = load_images(args.images, args.max_images)
    models = load_models(args.model, args.adapters)
    processor = load_processor(args.model)
    shared = num_processes() > 1
    device = own_device(args.device) if shared else choose_device(args.device)
    reports = [
        audit(
            model.to(device),
            images,
            image_processor=processor,
            rule=args.rule,
            attentions=args.attentions,
            sinks=args.sinks,
            batch_size=args.batch_size,
            max_images=args.max_images,
            name=name,
            strict=args.strict,
            progress=args.progress,
            shared=shared,
        )
        for name, model in models.items()
    ]
    if not is_main_process():
        return reports, None
    examples, why_none = _read_examples(models, images, processor)
    with staged(args.output_dir) as folder:
        written = {"reports": [report.to_dict() for report in reports]}
        (folder / "audit.json").write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", "utf-8")
        origin = Origin(args.model, args.images, args.max_images)
        write_page(folder / "index.html", reports, examples, origin=origin)
    return reports, why_none


def _read_examples(
    models: Mapping[str, nn.Module], images: Any, processor: Any
) -> tuple[Sequence[Example], str | None]:
    """The first good images with their maps, or why there are none."""
    sources = (item["image"] if isinstance(item, dict) else item for item in images)
    shown = list(islice((source for source in sources if check_image(source) is None), _SHOWN))
    try:
        return read_examples(models, shown, image_processor=processor), None
    except (UnsupportedModelError, ImageInputError) as error:
        return (), str(error)
