"""One downstream task under a model and each of its adapters, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ...data.texts import TextTokenizer
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
from ...utils.files import parse_json, read_text
from ...utils.staging import check_target, staged
from ...viz.page import write_task_page
from .inputs import choose_device, load_models, load_processor
from .open_clip_models import is_open_clip, open_clip_tokenizer
from .task_data import class_folders, load_task_data

__all__ = ["RESULT", "TASKS", "EvalArguments", "run_eval"]

#: The file with a result and all of its choices.
RESULT = "eval.json"
_PAGE = "index.html"


@dataclass(frozen=True)
class EvalArguments:
    """What to evaluate.

    Attributes:
        task: One of :data:`TASKS`.
        model: Name or folder of a model of transformers, or OpenCLIP's ``hf-hub:…`` or ``local-dir:…``; ``"planted"``
            or ``"clean"`` for the packaged ViT.
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
        tokenizer: Folder or name of a tokenizer, for zero-shot, where the model's own has none.
        annotations: COCO annotation file, for discovery.
        split: List of images of a VOC devkit, for discovery.
        features: Of the rows at reference settings, for discovery.
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
    size: int | tuple[int, int] | None = None
    classes: str | None = None
    templates: str | None = None
    tokenizer: str | None = None
    annotations: str | None = None
    split: str = "trainval"
    features: str = "keys"
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
        ValueError: There is no such task, the data do not have its layout, or ``output_dir`` holds another task's
            result; and as for the task's function.
        OSError: Something cannot be read or written.
        RegisterAdapterError: An adapter is another base's; and as for the task's function.
    """
    if args.task not in TASKS:
        raise ValueError(f"task {args.task!r}, expected one of {', '.join(TASKS)}")
    task = TASKS[args.task]
    _refuse_others(args)
    for place, files in ((args.output_dir, (RESULT, _PAGE)), (args.store, ())):
        if place is not None:
            check_target(place, *class_folders(args.task, args.data), files=files)
    _refuse_another_task(args)
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
    taken = {name: getattr(args, name) for name in (*_COMMON, *task.takes)}
    named = {name: getattr(data, name) for name in task.named}
    parts = [getattr(data, name) for name in task.parts]
    report = task.run(models, *parts, image_processor=load_processor(args.model), **named, **taken)
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
            write_task_page(folder / _PAGE, report, title=f"Evaluation: {args.task} of {args.model}")
    return report


_Models = Mapping[str, nn.Module]


def _zero_shot(
    models: _Models, test: Any, *, classes: str | None, templates: str | None, tokenizer: str | None, **options: Any
) -> TaskReport:
    name, base = next(iter(models.items()))
    tokenize: Any = None
    if is_open_clip(name):
        tokenize = open_clip_tokenizer(name, tokenizer)
    elif tokenizer is not None:
        tokenize = TextTokenizer.of(base, tokenizer)
    return evaluate_zero_shot(
        models,
        test,
        None if classes is None else read_classes(classes),
        templates=TEMPLATES if templates is None else read_templates(templates),
        tokenizer=tokenize,
        **options,
    )


_CORLOC = Metric(
    "CorLoc", "share of the images whose box has an intersection over union of 0.5 or more with a true one"
)


def _discovery(models: _Models, test: Any, *, sweep: bool, seed: int, strict: bool, **options: Any) -> TaskReport:
    """CorLoc; bad images are refused in any case."""
    measured = evaluate_discovery(models, test, sweep=Sweep() if sweep else None, seed=seed, **options)
    return _as_tasks(measured, models, seed)


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


class _Task(NamedTuple):
    """What a task runs.

    Attributes:
        run: Called with the models by name, the parts of the data, and the arguments below by their names.
        parts: Of :class:`~register_adapter.commands.runs.task_data.TaskData`.
        takes: Of :class:`EvalArguments`, besides those that all tasks take.
        reads: Of :class:`EvalArguments`, those that say how its data are read.
        named: Parts of the data that are handed on by name.
    """

    run: Callable[..., TaskReport]
    parts: tuple[str, ...] = ("train", "test")
    takes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    named: tuple[str, ...] = ()


#: Arguments that name something, and nothing if they are empty.
_NAMES = {"classes", "templates", "tokenizer", "annotations", "split"}
_COMMON = ("batch_size", "seed", "progress", "strict")
TASKS: dict[str, _Task] = {
    "knn": _Task(evaluate_knn, takes=("k", "temperature", "feature", "store")),
    "linear": _Task(evaluate_linear, takes=("store",)),
    "segmentation": _Task(evaluate_segmentation, takes=("size", "store"), named=("classes",)),
    "depth": _Task(evaluate_depth, takes=("head", "size", "store")),
    "zero-shot": _Task(_zero_shot, ("test",), takes=("classes", "templates", "tokenizer")),
    "discovery": _Task(_discovery, ("test",), takes=("size", "features", "sweep"), reads=("annotations", "split")),
}


def _refuse_others(args: EvalArguments) -> None:
    """Refuse what only other tasks take: it would change nothing, unnoticed.

    Raises:
        ValueError: Such an argument is given; or one of this task's that names something is empty.
    """
    mine = {*TASKS[args.task].takes, *TASKS[args.task].reads}
    users: dict[str, list[str]] = {}
    for name, task in TASKS.items():
        for argument in (*task.takes, *task.reads):
            users.setdefault(argument, []).append(name)
    defaults = {item.name: item.default for item in fields(EvalArguments)}
    for argument, tasks in users.items():
        if argument not in mine and getattr(args, argument) != defaults[argument]:
            raise ValueError(f"{argument}= is for {', '.join(tasks)}; {args.task} takes no such thing")
        if argument in mine & _NAMES and getattr(args, argument) == "":
            raise ValueError(f"{argument}= is empty; give a name, or leave it out")


def _refuse_another_task(args: EvalArguments) -> None:
    """Keep a result that this one is not a newer form of.

    Raises:
        ValueError: ``output_dir`` has another task's.
    """
    path = Path(args.output_dir, RESULT) if args.output_dir is not None else None
    if path is None or not path.is_file():
        return
    try:
        task = parse_json(read_text(path))["task"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of an evaluation; give another folder, or move it away") from error
    if task != args.task:
        raise ValueError(f"{path} is the result of {task!r}, which {args.task} would write over; give another folder")
