"""The audit: does a model have artifacts, from which layer on, how many, where, and what do they do?"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from ..data.processors import source_of
from ..errors import UnsupportedModelError
from ..features.layout import adapters_stay, native_registers
from ..features.passes import PassOptions, open_pass
from ..features.subjects import keeping_adapters
from ..towers.anatomy import Anatomy
from ..towers.tower import Tower
from ..tuner.layer import find_register_layer
from ..utils.environment import git_commit, machine, versions
from .layer_report import DEFINITIONS
from .patch_sketch import Edges
from .report import ArtifactReport, LayerReport
from .rules.histogram import RELATIVE_ERROR
from .rules.rules import Rule, resolve_rule, rule_name
from .sharing import run_shared, share_of
from .sink_report import SINK_DEFINITION, SinkReport, advise
from .statistics import Statistics
from .verdicts import attention_in_words, judge

__all__ = ["audit", "audit_outliers", "build_report"]


@keeping_adapters
def audit(
    model: nn.Module,
    images: Any,
    *,
    image_processor: Any = None,
    rule: str | Rule = "auto",
    attentions: bool = True,
    batch_size: int = 32,
    max_images: int | None = None,
    name: str | None = None,
    progress: bool = True,
    strict: bool = False,
    num_workers: int = 2,
    target_modules: str | None = None,
    anatomy: Anatomy | None = None,
    shared: bool = False,
    sinks: bool = False,
) -> ArtifactReport:
    """Find out whether a model has artifacts, in one pass over images.

    The pass streams: hidden states and attention maps are reduced on the model's device, block by block, and no token
    is kept, so that memory does not grow with the number of images. Rules are applied afterwards, to histograms.
    Only the vision tower runs, in evaluation mode; the model is as before afterwards, also after an exception.

    Args:
        model: A base model, a model with head, or one with registers, whose active adapter takes part.
        images: A folder of images (with those below it), paths, PIL images, a data set of ``{"image": ...}`` items, a
            tensor ``(M, 3, H, W)``, or ready batches: tensors ``(B, 3, H, W)``, or dictionaries of the tower's
            keywords.
        image_processor: Of transformers, or any function from a PIL image to ``(3, H, W)``; default: the one of the
            model's own name or folder. Ready batches need none.
        rule: Name of a rule in :data:`~register_adapter.artifacts.RULES`, with a number where it takes one
            (``"fixed:75"``), or a function like those.
        attentions: Sum attention maps too: slower, because fused attention returns none.
        batch_size: Images per batch.
        max_images: Use at most this many images, the first ones.
        name: What the report calls the model.
        progress: Show a bar.
        strict: Refuse bad images instead of skipping them with a warning.
        num_workers: Threads that read images.
        target_modules: Name of the vision tower, where there are several.
        anatomy: Description of a model that the table does not have.
        shared: Called in every process of ``accelerate launch`` with the same images: each takes a part of them, and
            all return the report of all.
        sinks: Look for attention sinks in every head, and tell those that park attention from those that all tokens
            read (:class:`~register_adapter.artifacts.sink_report.SinkReport`); needs ``attentions``, and takes longer.

    Returns:
        The report.

    Raises:
        UnsupportedModelError: No single vision tower, or an attention that returns no maps.
        ImageFileError: ``strict`` and an image is bad, or none is good.
        RegisterAdapterError: Hidden states that are not finite.
        ValueError: No images, an unknown rule, no image processor, or ``sinks`` without ``attentions``.

    Example:
        >>> report = audit(AutoModel.from_pretrained("facebook/dinov2-base"), "photos/")
        >>> report.verdict, report.reason
    """
    chosen = resolve_rule(rule)
    options = PassOptions(
        image_processor=image_processor,
        batch_size=batch_size,
        max_images=max_images,
        num_workers=num_workers,
        strict=strict,
        progress=progress,
    )
    start = time.perf_counter()
    if shared and (state := PartialState()).num_processes > 1:
        images = share_of(images, max_images, state.process_index, state.num_processes)
        options = replace(options, max_images=None, progress=progress and state.is_main_process)
    # A process for which there is no image opens a pass, for what is known of the model, and makes none.
    given = images if images is not None else torch.zeros(1, 3, 1, 1)
    opened = open_pass(model, given, options, target_modules=target_modules, anatomy=anatomy, title="audit")
    with adapters_stay(opened.registers):  # name and count of registers are those of the passes
        statistics = Statistics(opened.tower, attentions, sinks)

        def run() -> None:
            if images is not None:
                opened.run(statistics)

        skipped = run_shared(statistics, run, lambda: opened.skipped, strict) if shared else None
        if skipped is None:
            run()
        if not statistics.num_images:
            raise ValueError("an audit needs at least one image, and none came")
        report = build_report(statistics, chosen, rule_name(rule), name or _called(model, opened.tower))
    report.environment.update(
        versions=versions(),
        hardware=machine(opened.device),
        commit=git_commit(),
        seconds=round(time.perf_counter() - start, 3),
        dtype=str(opened.dtype).removeprefix("torch."),
        batch_size=batch_size,
        attentions=attentions,
        skipped=opened.skipped if skipped is None else skipped,
    )
    return report


def audit_outliers(model: nn.Module, images: Any, rule: str | Rule, **options: Any) -> ArtifactReport:
    """An audit for its lines between norms: attention is looked at only where norms alone show nothing.

    Args:
        model: As for :func:`audit`.
        images: As there; what can be gone through twice.
        rule: As there.
        **options: Further arguments of :func:`audit`.
    """
    report = audit(model, images, rule=rule, attentions=False, progress=False, **options)
    if report.verdict != "none":
        return report
    try:
        return audit(model, images, rule=rule, progress=False, **options)
    except UnsupportedModelError:  # its attention returns no maps
        return report


def build_report(statistics: Statistics, rule: Rule, rule_called: str, name: str) -> ArtifactReport:
    """Apply a rule to what was summed; see :func:`audit`. Several rules can be applied to one pass.

    Args:
        statistics: After the passes.
        rule: The rule.
        rule_called: Its name.
        name: What to call the model.
    """
    finding = judge(statistics, rule)
    layers = finding.layers
    definitions = dict(DEFINITIONS)
    if statistics.no_grid:
        missing = f" Not known here: {statistics.no_grid}."
        for key in ("similarity", "border_distance", "position_map", "recurrence"):
            definitions[key] += missing
    if sinks := _sinks(statistics, layers):
        definitions["sinks"] = SINK_DEFINITION
        if sinks.missing or not sinks.projected:
            definitions["sinks"] += f" Here: {sinks.missing or 'values before an output projection of unknown name'}."
    tower = statistics.tower
    report = ArtifactReport(
        name=name,
        verdict=finding.verdict,
        reason=finding.reason,
        first_layer=finding.first_layer,
        layers=layers,
        rule=rule_called,
        family=tower.anatomy.family,
        num_images=statistics.num_images,
        num_registers=statistics.num_registers,
        native_registers=native_registers(tower),
        grid=statistics.grid,
        relative_error=RELATIVE_ERROR,
        definitions=definitions,
        environment={"statistics_bytes": statistics.nbytes},
        sinks=sinks,
        evidence=finding.evidence,
        kind=finding.kind,
    )
    return replace(report, reason=f"{finding.reason} {attention_in_words(report)}")


def _sinks(statistics: Statistics, layers: list[LayerReport]) -> SinkReport | None:
    """Every head's sinks; patches are outliers by the line of the layer that a block reads."""
    recorder = statistics.sinks
    if recorder is None:
        return None
    if recorder.missing:
        return SinkReport([], [], recorder.missing)
    thresholds = {layer.layer: layer.threshold for layer in layers}
    sketches = sorted(recorder.sketches.items())
    heads = [head for block, sketch in sketches for head in sketch.heads(block, Edges(thresholds[block]))]
    return SinkReport(heads, advise(heads), projected=all(sketch.projected for _, sketch in sketches))


def _called(model: nn.Module, tower: Tower) -> str:
    source = (source_of(model, tower) or type(tower.module).__name__).rstrip("/\\").replace("\\", "/")
    name = source if source.count("/") == 1 and not source.startswith(("/", ".")) else source.rpartition("/")[2]
    layer = find_register_layer(model)
    active = layer.names_at_work if layer is not None else []
    return f"{name} + {', '.join(active)}" if active else name
