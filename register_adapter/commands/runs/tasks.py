"""One downstream task under a model and each of its adapters, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...evaluation import (
    TaskReport,
    evaluate_depth,
    evaluate_discovery,
    evaluate_knn,
    evaluate_linear,
    evaluate_segmentation,
    evaluate_zero_shot,
)
from ...evaluation.discovery import DiscoveryReport, Share, Sweep
from ...evaluation.downstream import (
    TEMPLATES,
    Metric,
    Score,
    TaskRow,
    describe,
    read_classes,
    read_templates,
)
from ...utils.environment import machine, versions
from ...utils.staging import check_target, staged
from ...viz.page import write_task_page
from .inputs import choose_device, load_models, load_processor
from .task_data import TaskData, load_task_data

__all__ = ["RESULT", "TASKS", "EvalArguments", "run_eval"]

#: The file with a result and all of its choices.
RESULT = "eval.json"


@dataclass(frozen=True)
class EvalArguments:
    """What to evaluate.

    Attributes:
        task: One of :data:`TASKS`.
        model: Name or folder of a model of transformers; ``"planted"`` or ``"clean"`` for the packaged ViT.
        data: Folder with the layout of the task; ``"scenes"`` for images that the package draws.
        adapters: Folders or names of adapters; each is measured beside the model.
        output_dir: Folder for ``eval.json`` and ``index.html``; ``None`` writes nothing.
        k: Numbers of neighbours, see :func:`register_adapter.evaluation.evaluate_knn`.
        temperature: See there.
        feature: See there.
        head: See :func:`register_adapter.evaluation.evaluate_depth`.
        size: See :func:`register_adapter.evaluation.evaluate_segmentation`.
        classes: File of :func:`register_adapter.evaluation.downstream.read_classes`, for zero-shot.
        templates: File of :func:`register_adapter.evaluation.downstream.read_templates`, for zero-shot.
        annotations: COCO annotation file, for discovery.
        split: List of images of a VOC devkit, for discovery.
        sweep: Discovery at settings chosen on held-out images too.
        store: Folder for features.
        max_images: At most so many images of each set, at random.
        batch_size: Images per batch.
        seed: Seed of everything random.
        device: Where to run; default: a GPU if there is one.
        strict: Refuse bad images.
        progress: Show bars.
    """

    task: str
    model: str
    data: str
    adapters: Sequence[str] = field(default_factory=tuple)
    output_dir: str | None = None
    k: Sequence[int] = (10, 20, 100, 200)
    temperature: float = 0.07
    feature: str = "auto"
    head: str = "bins"
    size: int | None = None
    classes: str | None = None
    templates: str | None = None
    annotations: str | None = None
    split: str = "trainval"
    sweep: bool = True
    store: str | None = None
    max_images: int | None = None
    batch_size: int = 32
    seed: int = 0
    device: str | None = None
    strict: bool = False
    progress: bool = True


def run_eval(args: EvalArguments) -> TaskReport:
    """Evaluate the model and every adapter, and write ``eval.json`` and ``index.html`` if a folder is given.

    Raises:
        ValueError: There is no such task, or the data do not have its layout; and as for the task's function.
        OSError: Something cannot be read or written.
        RegisterAdapterError: An adapter is another base's; and as for the task's function.
    """
    if args.task not in TASKS:
        raise ValueError(f"task {args.task!r}, expected one of {', '.join(TASKS)}")
    for place in (args.output_dir, args.store):
        if place is not None:
            check_target(place)
    data = load_task_data(
        args.task,
        args.data,
        max_images=args.max_images,
        seed=args.seed,
        annotations=args.annotations,
        split=args.split,
    )
    models = load_models(args.model, args.adapters)
    device = choose_device(args.device)
    for model in models.values():
        model.to(device)
    common = {
        "image_processor": load_processor(args.model),
        "batch_size": args.batch_size,
        "seed": args.seed,
        "progress": args.progress,
    }
    report = TASKS[args.task](args, models, data, common)
    origin = {
        "model": args.model,
        "adapters": list(args.adapters),
        "data": args.data,
        "layout": data.layout,
        "max_images": args.max_images,
        "machine": machine(torch.device(device)),
    }
    report = replace(report, settings={**origin, **report.settings})
    if args.output_dir is not None:
        with staged(args.output_dir) as folder:
            written = json.dumps(report.to_dict(), indent=1, allow_nan=False)
            (folder / RESULT).write_text(written + "\n", "utf-8")
            write_task_page(folder / "index.html", report, title=f"Evaluation: {args.task} of {args.model}")
    return report


_Models = Mapping[str, nn.Module]
_Common = Mapping[str, Any]


def _knn(args: EvalArguments, models: _Models, data: TaskData, common: _Common) -> TaskReport:
    return evaluate_knn(
        models,
        data.train,
        data.test,
        k=args.k,
        temperature=args.temperature,
        feature=args.feature,  # type: ignore[arg-type]
        store=args.store,
        strict=args.strict,
        **common,
    )


def _linear(args: EvalArguments, models: _Models, data: TaskData, common: _Common) -> TaskReport:
    return evaluate_linear(models, data.train, data.test, store=args.store, strict=args.strict, **common)


def _segmentation(args: EvalArguments, models: _Models, data: TaskData, common: _Common) -> TaskReport:
    return evaluate_segmentation(
        models,
        data.train,
        data.test,
        classes=data.classes,
        size=args.size,
        store=args.store,
        strict=args.strict,
        **common,
    )


def _depth(args: EvalArguments, models: _Models, data: TaskData, common: _Common) -> TaskReport:
    return evaluate_depth(
        models,
        data.train,
        data.test,
        head=args.head,  # type: ignore[arg-type]
        size=args.size,
        store=args.store,
        strict=args.strict,
        **common,
    )


def _zero_shot(args: EvalArguments, models: _Models, data: TaskData, common: _Common) -> TaskReport:
    templates = TEMPLATES if args.templates is None else read_templates(args.templates)
    classes = None if args.classes is None else read_classes(args.classes)
    return evaluate_zero_shot(models, data.test, classes, templates=templates, strict=args.strict, **common)


_CORLOC = Metric(
    "CorLoc", "share of the images whose box has an intersection over union of 0.5 or more with a true one"
)


def _discovery(args: EvalArguments, models: _Models, data: TaskData, common: _Common) -> TaskReport:
    sweep = Sweep() if args.sweep else None
    measured = evaluate_discovery(models, data.test, size=args.size, sweep=sweep, **common)
    return _as_tasks(measured, models, args.seed)


def _as_tasks(measured: DiscoveryReport, models: _Models, seed: int) -> TaskReport:
    def score(share: Share) -> Score:
        return Score(share.value, share.low, share.high)

    rows = [
        TaskRow(
            row.model,
            f"{row.plan.method}, {'swept' if row.swept else 'reference'}",
            score(row.corloc),
            None if row.difference is None else score(row.difference),
            {
                **row.plan.to_dict(),
                **({"held_out": len(measured.held_out)} if row.swept else {}),
                "tried": [{**plan.to_dict(), "CorLoc": value} for plan, value in row.held_out],
                "boxes": [list(box) for box in row.boxes],
            },
            tuple(map(float, row.right)),
        )
        for row in measured.rows
    ]
    order = list(dict.fromkeys(row.setting for row in rows))
    notes = [f"{measured.skipped} images have no true box and are left out"] if measured.skipped else []
    return TaskReport(
        "discovery",
        _CORLOC,
        tuple(sorted(rows, key=lambda row: order.index(row.setting))),
        0,
        len(measured.names),
        {
            "images": list(measured.names),
            "held_out": list(measured.held_out),
            "seed": seed,
            "interval": "95 %, percentile bootstrap over test images; differences are paired by image",
            "versions": versions(),
        },
        {name: describe(model) for name, model in models.items()},
        (),
        tuple(notes),
    )


#: What each task runs.
TASKS: dict[str, Callable[[EvalArguments, _Models, TaskData, _Common], TaskReport]] = {
    "knn": _knn,
    "linear": _linear,
    "segmentation": _segmentation,
    "depth": _depth,
    "zero-shot": _zero_shot,
    "discovery": _discovery,
}
