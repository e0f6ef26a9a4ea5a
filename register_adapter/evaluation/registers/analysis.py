"""What registers do: where they look, how alike they are, what is lost without them, how far they move the outputs.

Works for the registers of adapters and for those that a model was made with (DINOv2 with registers, DINOv3, timm's
``reg_tokens``), through hooks on the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ...features.finite import subject_in_words
from ...features.layout import adapters_stay
from ...features.passes import Batch, PassOptions, open_pass
from ...towers.anatomy import Anatomy
from ...towers.modes import evaluating
from ...utils.environment import versions
from .maps import RegisterMaps
from .report import RegisterReport
from .runs import Arm, Runs, estimate_means
from .states import Kind, Registers, find_registers

__all__ = ["analyse_registers"]


def analyse_registers(
    model: nn.Module,
    images: Any,
    labels: Sequence[int] | None = None,
    *,
    image_processor: Any = None,
    kind: Kind | None = None,
    mean_images: Any = None,
    block: int = -1,
    ablate_blocks: Sequence[int] | None = None,
    each: bool = False,
    num_maps: int = 8,
    seed: int = 0,
    batch_size: int = 32,
    max_images: int = 256,
    progress: bool = False,
    strict: bool = False,
    num_workers: int = 2,
    target_modules: str | None = None,
    anatomy: Anatomy | None = None,
) -> RegisterReport:
    """Attention maps, similarity, mean and shuffle ablation, and drift of a model's registers.

    Nothing is ever set to zero, see :data:`~.register_report.WHY_NOT_ZERO`.

    Args:
        model: A model with registers, of an active adapter or its own; it runs in ``eval()`` mode and is left as
            it was.
        images: As for :func:`~register_adapter.artifacts.audit`, all of one size, in random order: the shuffle
            exchanges registers within a batch, and every second batch is taken for the means. Labels may come with
            them, as for :func:`~register_adapter.artifacts.probe_tokens`. At most ``max_images`` are held in memory.
        labels: Number of every image's class among the model's own, if they come apart; with labels, and a model that
            returns logits, accuracies are measured too.
        image_processor: As for the audit.
        kind: ``"adapter"`` or ``"native"``; ``None`` takes the adapters' where there are any.
        mean_images: Other images that means are taken over. ``None`` takes every second batch of ``images`` away for
            them (or, of a single batch, half).
        block: The block that the maps in ``attention`` are from.
        ablate_blocks: Blocks at whose input registers are replaced; ``None`` for all that have them.
        each: Ablate every register alone too.
        num_maps: Number of images whose maps are kept.
        seed: Seed of the exchange between images.
        batch_size: As for the audit, as are all below.
        max_images: Use at most this many of ``images``, and of ``mean_images``.
        progress: Show a bar.
        strict: Refuse bad images instead of skipping them with a warning.
        num_workers: Threads that read images.
        target_modules: Name of the vision tower, where there are several and none has an adapter's registers.
        anatomy: Description of a model that the table does not have.

    Raises:
        UnsupportedModelError: No registers, or those of an adapter with ``key_value=True``; no attention maps.
        ImageFileError: ``strict`` and an image is bad, or none is good.
        RegisterAdapterError: Hidden states are not finite (NaN or infinite).
        ValueError: Too few images; no batch of two images to exchange registers between; a block that has no registers.
    """
    registers = find_registers(model, kind, target_modules, anatomy)
    tower = registers.tower
    options = PassOptions(
        image_processor=image_processor,
        batch_size=batch_size,
        max_images=max_images,
        num_workers=num_workers,
        strict=strict,
    )
    skipped: list[str] = []

    def read(source: Any, its_labels: Sequence[int] | None) -> list[Batch]:
        opened = open_pass(
            model,
            source,
            options,
            labels=its_labels,
            with_labels=True,
            target_modules=target_modules,
            anatomy=anatomy,
        )
        read_batches = list(opened)
        skipped.extend(opened.skipped)
        return read_batches

    with adapters_stay(registers.layer):  # whatever other threads set meanwhile
        index, blocks = _check_blocks(registers, block, ablate_blocks)
        batches = read(images, labels)
        batches, others = _divide(batches) if mean_images is None else (batches, read(mean_images, None))
        if not batches or not others:
            raise ValueError(
                "register analysis needs images to measure on and other images for the means: at least two"
            )
        arms, notes = _arms(registers, blocks, each)
        if any(arm.kind == "shuffle" for arm in arms) and all(batch.size == 1 for batch in batches):
            raise ValueError(
                "shuffle ablation exchanges registers between the images of a batch; give batches of two images"
            )
        maps = RegisterMaps(registers, index, num_maps)
        with evaluating(model):
            means = estimate_means(registers, others, subject_in_words(model))
            runs = Runs(model, registers, means, arms, seed)
            for batch in tqdm(batches, desc="registers", unit="batch", disable=not progress):
                maps.look(batch)
                runs.add(batch)
        if runs.accuracy() is None and any(batch.labels is not None for batch in batches):
            notes.append("the model returns no logits: accuracies are not measured")
        return RegisterReport(
            kind=registers.kind,
            family=tower.anatomy.family,
            names=registers.names,
            block=index,
            grid=maps.grid,
            attention=maps.attention(),
            map_similarity=maps.similarity(),
            output_similarity=runs.output_similarity(),
            attention_shares=maps.shares(),
            constancy=means.constancy,
            ablations=runs.ablations(),
            drift=runs.drift(),
            accuracy=runs.accuracy(),
            num_images=sum(batch.size for batch in batches),
            num_mean_images=sum(batch.size for batch in others),
            notes=notes,
            skipped=skipped,
            versions=versions(),
        )


def _check_blocks(registers: Registers, block: int, ablate: Sequence[int] | None) -> tuple[int, tuple[int, ...]]:
    count = registers.num_blocks
    wanted = (block, *(ablate or ()))
    if outside := [number for number in wanted if not -count <= number < count]:
        raise ValueError(f"blocks {outside} of a tower with {count}")
    full = [number for number in range(count) if registers.count_in(number) == registers.count]
    present = [number for number in range(count) if registers.count_in(number)]
    if block % count not in full:
        raise ValueError(f"block {block % count} does not have all {registers.count} registers; blocks {full} do")
    chosen = present if ablate is None else sorted({number % count for number in ablate})
    if missing := sorted(set(chosen) - set(present)):
        raise ValueError(f"blocks {missing} have no registers to replace; blocks {present} do")
    return block % count, tuple(chosen)


def _arms(registers: Registers, blocks: tuple[int, ...], each: bool) -> tuple[list[Arm], list[str]]:
    """The ablations, and notes on them."""
    deep = registers.deep
    if all(deep):
        return [], [
            "fresh registers enter at every block (deep=True): what a block reads of them is the same for every "
            "image by construction, so there is no ablation"
        ]
    notes = []
    if any(deep):
        names = ", ".join(name for name, is_deep in zip(registers.names, deep, strict=True) if is_deep)
        notes.append(f"{names}: fresh ones at every block (deep=True), the same for every image; ablating them is void")
    alone = [(number,) for number, is_deep in enumerate(deep) if not is_deep] if each and registers.count > 1 else []
    groups = [tuple(range(registers.count)), *alone]
    return [Arm(kind, numbers, blocks) for numbers in groups for kind in ("mean", "shuffle")], notes


def _divide(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Every second batch for the means, or half of the only one."""
    if len(batches) == 1 and batches[0].size > 1:
        return [batches[0].half(False)], [batches[0].half(True)]
    return batches[::2], batches[1::2]
