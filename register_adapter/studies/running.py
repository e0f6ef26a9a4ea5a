"""A study: audit, repairs and their controls, figures on held-out images, a recommendation, and one page."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..artifacts import ArtifactReport, audit, resolve_rule
from ..data.processing import pixels_alone, process_image, settings_of
from ..data.processors import find_image_processor, source_of
from ..errors import RegisterAdapterError, UnsupportedModelError
from ..evaluation.downstream.provenance import combined_digest, weights_digest
from ..towers.identity import TowerIdentity
from ..towers.tower import Tower, find_tower
from ..training.run_lock import folder_lock
from ..utils.arguments import check_whole
from ..utils.environment import version
from ..utils.staging import check_target
from .arms import ARMS, TEACHER, Arm, Bench
from .cards import card_facts
from .choice import choose, leave
from .images import Images, Part, read_images
from .records import ADAPTER, Record, Records
from .result import FILES, Origin, Outcome, StudyResult, write_result
from .ruler import Figures, Ruler, outlier_factor
from .tasks import Accuracy, Task

__all__ = ["study"]

#: Passes of one image, for which training steps count too; arms take very different times.
_BAR = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
_NO_FIT = "the attention of this model cannot be given pairs or gates"


def study(
    model: nn.Module,
    images: Any,
    output_dir: str | Path,
    *,
    image_processor: Any = None,
    task: Task | None = None,
    steps: int = 60,
    seed: int = 0,
    seeds: int = 1,
    arms: Sequence[str] | None = None,
    rule: str = "auto",
    max_images: int | None = 512,
    batch_size: int = 16,
    strict: bool = False,
    progress: bool = True,
    model_name: str | None = None,
    images_name: str | None = None,
) -> StudyResult:
    """Find out whether a model has artifacts, what repairs it, at what cost, and which of it to take.

    Half of the images are audited, fitted and trained on; by half of the rest an arm is chosen; figures are of the
    others. What is finished is in the folder, and a study that was interrupted goes on when it is started again; its
    adapters and figures are the same then, on a CPU bit for bit.

    Args:
        model: A model of transformers as it is; it is left so. Every arm has a copy of it.
        images: A folder, or a sequence of paths, PIL images or ``{"image": ...}`` items, at least 12. No labels.
        output_dir: Folder for adapters, figures, ``study.json`` and the page, ``index.html``.
        image_processor: By default the model's own.
        task: What the model is for, measured with its own head; see :class:`Accuracy`. ``None``: not known.
        steps: Optimiser steps of 16 images of every training; default 60.
        seed: First seed of what is random.
        seeds: Number of seeds; more can be added to a study that has ended.
        arms: Names of :data:`ARMS` to make, the base always among them; default all.
        rule: The audit's rule for outliers.
        max_images: Use at most so many images, at random; ``None``: all.
        batch_size: Images in a pass.
        strict: Refuse bad images instead of skipping them.
        progress: Show a bar.
        model_name: What to call the model, also in the recommended command; by default where it was loaded from.
        images_name: The same for the images.

    Returns:
        What ``study.json`` holds, with the verdict, the recommendation and the command that follows it.

    Raises:
        ValueError: An argument is out of range, there are too few images, the folder has a study with other settings,
            or a model with artifacts has adapters already.
        UnsupportedModelError: The model has no single vision tower, or takes rows of patches in place of images.
        OSError: Nothing can be written into the folder, or an image cannot be read.
        FolderInUseError: Another study, or training, writes into the folder.

    Example:
        >>> result = study(AutoModel.from_pretrained("facebook/dinov2-base"), "photos", "study")
        >>> print(result.headline, result.command)
    """
    for name, value, least in (
        ("steps", steps, 1),
        ("seeds", seeds, 1),
        ("seed", seed, 0),
        ("batch_size", batch_size, 1),
    ):
        check_whole(name, value, least)
    chosen = _chosen(arms)
    resolve_rule(rule)
    tower = find_tower(model)
    _check_call(model)
    check_target(output_dir, files=FILES)
    out = Path(output_dir)
    image_processor = image_processor or find_image_processor(source_of(model))
    pixels_alone(process_image(image_processor, Image.new("RGB", (256, 256), "grey"), "a grey image"), image_processor)
    shared = read_images(images, image_processor, max_images, strict)
    settings = {
        "model": TowerIdentity.of(tower).to_dict(),
        "weights": _weights_digest(model, tower, task)[:16],
        "processor": _processor_digest(image_processor),
        "images": [len(shared.items), shared.digest()],
        **{"steps": steps, "rule": rule, "batch_size": batch_size},
        **{"task": task.source if task else None, "version": version()},
    }
    with folder_lock(out):
        records = Records(out)
        records.check(settings)
        images_name = images_name or (str(images) if isinstance(images, str | Path) else None)
        run = _Run(
            *(model, shared, image_processor, task, steps, range(seed, seed + seeds), rule, batch_size, records),
            images_name,
            progress,
        )
        outcome = run.outcome([arm for arm in ARMS if arm.kind == "base" or arm.name in chosen])
        origin = Origin(
            model_name or getattr(model, "name_or_path", "") or type(model).__name__,
            images_name,
            settings,
        )
        return write_result(outcome, origin, model, shared, image_processor, task, run.seeds, records)


def _check_call(model: nn.Module) -> None:
    """Refuse models that are called in another way than training calls them.

    Raises:
        UnsupportedModelError: It is one.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if "pixel_values" not in inspect.signature(inner.forward).parameters:
        raise UnsupportedModelError(
            f"{type(inner).__name__} is not called as model(pixel_values=...), as models of transformers are, so "
            "that a study cannot train it; audit() and fit_test_time_registers() take it"
        )


def _weights_digest(model: nn.Module, tower: Tower, task: Task | None) -> str:
    """A hash of the weights that figures depend on.

    Many checkpoints lack the pooler of their class, or the head where nobody asks for what it says: both are new at
    random then, whenever they are loaded. What a class's logits are made of is compared whole (BEiT's pooler, too).
    """
    if isinstance(task, Accuracy):
        return weights_digest(model)
    return weights_digest(model if task else tower.module, without="pooler")


def _processor_digest(image_processor: Any) -> str:
    """A short hash of what an image processor does; one with random steps has that of its class."""
    try:
        settings = settings_of(image_processor)
    except ValueError:
        settings = type(image_processor).__name__
    return combined_digest([json.dumps(settings, sort_keys=True, default=str)])[:16]


def _chosen(names: Sequence[str] | None) -> list[str]:
    """Names of arms, with those whose adapters they need.

    Raises:
        ValueError: There is no such arm.
    """
    known = {arm.name: arm for arm in ARMS}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"there is no arm {unknown[0]!r}; there are {', '.join(map(repr, known))}")
    chosen = list(known) if names is None else list(names)
    return [*chosen, *(after for name in chosen if (after := known[name].after) is not None)]


@dataclass
class _Run:
    """A study on its way."""

    model: nn.Module
    images: Images
    image_processor: Any
    task: Task | None
    steps: int
    seeds: range
    rule: str
    batch_size: int
    records: Records
    images_name: str | None
    progress: bool
    base: Figures | None = None

    def outcome(self, arms: Sequence[Arm]) -> Outcome:
        """All phases but the last, which writes down what they gave."""
        bench = Bench(
            *(self.model, self.images.make, self.image_processor, self.steps, self.rule, self.batch_size),
            self.records.place(next(arm for arm in ARMS if arm.name == TEACHER), 0) / ADAPTER,
            self._tick,
        )
        runs = {arm.name: list(self.seeds if arm.seeded else self.seeds[:1]) for arm in arms}
        audited = len(self.images.make)
        measured = 2 * (len(self.images.choose) + len(self.images.report))
        work = sum(len(runs[arm.name]) * (arm.cost(bench) + measured) for arm in arms)
        bar = tqdm(total=audited + work, unit="pass", disable=not self.progress, bar_format=_BAR)
        with closing(bar):
            self.bar = bar
            bar.set_postfix_str("audit")
            report = self._audit(bench)
            self._tick(audited)
            rulers = _Rulers(self, outlier_factor(report))
            if report.verdict == "none":
                part = rulers.report
                records = {arms[0].name: [Record(None, part.base)]}
                return Outcome(report, leave(report), arms[:1], records, part.places, part.factor)
            if isinstance(self.model, PeftModel):
                raise ValueError(
                    f"the model has artifacts ({report.summary}) and adapters; give the base without adapters, whose "
                    "repair a study is about"
                )
            records = {}
            for arm in arms:
                records[arm.name] = [self._record(arm, run, bench, rulers, measured) for run in runs[arm.name]]
            made = {name: [r.choose for r in given if r.choose is not None] for name, given in records.items()}
            whole = [arm for arm in arms if len(made[arm.name]) == len(runs[arm.name])]
            choice = choose(whole, made, made[arms[0].name][0], self.task)
            return Outcome(report, choice, arms, records, rulers.report.places, rulers.report.factor)

    def _tick(self, count: int) -> None:
        self.bar.update(count)

    def _audit(self, bench: Bench) -> ArtifactReport:
        """Of the base, on the images that arms are made with."""
        report = self.records.audit()
        if report is None:
            report = audit(self.model, bench.batches, rule=self.rule, name="as it is", progress=False)
            self.records.keep_audit(report)
        return report

    def _record(self, arm: Arm, seed: int, bench: Bench, rulers: _Rulers, measured: int) -> Record:
        """One arm with one seed: what is there of it, or what is made of it now."""
        before = self.bar.n
        self.bar.set_postfix_str(f"{arm.name}, seed {seed}" if arm.seeded else arm.name)
        record = self.records.read(arm, seed)
        if record is None:
            record, model = self._made(arm, seed, bench, rulers)
            self.records.keep(arm, seed, record, model, self._facts(arm, seed, record))
        if arm.kind == "base":
            self.base = record.report
        self._tick(before + arm.cost(bench) + measured - self.bar.n)
        return record

    def _facts(self, arm: Arm, seed: int, record: Record) -> dict[str, Any]:
        if record.report is None or self.base is None:
            return {}
        task = self.task.name if self.task else "task"
        return card_facts(arm, seed, record.report, self.base, self.images, self.images_name, self.steps, task)

    def _made(self, arm: Arm, seed: int, bench: Bench, rulers: _Rulers) -> tuple[Record, nn.Module | None]:
        started = time.perf_counter()
        if not arm.fits(self.model):
            return Record(None, None, _NO_FIT), None
        if arm.after is not None and not bench.teacher.is_dir():
            return Record(None, None, f"it needs what “{arm.after}” makes, which could not be made"), None
        try:
            model = arm.make(bench, seed)
        except RegisterAdapterError as error:
            return Record(None, None, str(error)), None
        seconds = time.perf_counter() - started
        figures = [ruler.measure(model) for ruler in (rulers.choose, rulers.report)]
        return Record(figures[0], figures[1], None, seconds), model


class _Rulers:
    """The two rulers, each made when it is needed: a study that has ended needs neither."""

    def __init__(self, run: _Run, factor: float) -> None:
        self._run, self._factor = run, factor

    def _of(self, part: Part) -> Ruler:
        run = self._run
        return Ruler(
            *(run.model, part),
            rule=run.rule,
            factor=self._factor,
            task=run.task,
            batch_size=run.batch_size,
            tick=run._tick,
        )

    @cached_property
    def choose(self) -> Ruler:
        """On the images that an arm is chosen by."""
        return self._of(self._run.images.choose)

    @cached_property
    def report(self) -> Ruler:
        """On the images that are reported on."""
        return self._of(self._run.images.report)
