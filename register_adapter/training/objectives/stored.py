"""Targets of the frozen base, computed once for every training image and read from disk in every epoch."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...data.processing import settings_of
from ...features.layout import tower_of
from ...features.passes import keep_layer
from ...features.prefix import check_prefix
from ...features.store import STORE_NAME, FeatureStore, StoreError, StoreSpec, read_spec
from ...towers.identity import TowerIdentity
from ...utils.text import size_text
from .base import Objective
from .terms import Term, WeightedTerms
from .tokens import prefix_key, read_base

__all__ = ["StoredTargets", "store_targets"]

logger = logging.getLogger(__name__)
#: An image's sketches on a coarse grid, by which it is known again.
_SKETCH, _CELLS = "sketch", 4
#: Differences that rounding can make.
_TOLERANCE = 0.02
#: Images that are compared before a store that was there is used.
_COMPARED = 32


class StoredTargets(torch.utils.data.Dataset[dict[str, Any]]):
    """Items with the targets that a store holds for them.

    Args:
        dataset: Items with ``pixel_values``.
        store: From :func:`store_targets`.

    Raises:
        StoreError: On reading an item: the image is not the one that its targets were computed for.
    """

    def __init__(self, dataset: Any, store: FeatureStore) -> None:
        self.dataset, self.store = dataset, store

    def set_epoch(self, epoch: int) -> None:
        """As for the data set, if it has epochs."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, targets = self.dataset[index], self.store[index]
        if _SKETCH not in targets:
            raise StoreError(f"{self.store.folder} holds no targets of a training; name another folder")
        there, here = targets.pop(_SKETCH), _sketch_of(item["pixel_values"])
        if there.shape != here.shape or (there - here).abs().max() > _TOLERANCE * (1 + here.abs().max()):
            raise StoreError(
                f"image {index} is not the one that its targets in {self.store.folder} were computed for: the images, "
                "their order or the processor changed; name another folder, or delete that one"
            )
        return {**item, **targets}


def store_targets(
    objective: Objective,
    model: nn.Module,
    dataset: Any,
    accelerator: Accelerator,
    processor: Any = None,
    *,
    folder: str | Path,
    dtype: str = "bfloat16",
    prefix: int | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> StoredTargets:
    """Compute what the terms need of the frozen base, for every image, unless the folder has it already.

    Every process computes its share. A run that is killed goes on with the shards that are missing.

    Args:
        objective: Its terms, prepared.
        model: On the device where the base is to run; adapters are off meanwhile.
        dataset: The training images, each the same whenever it is read.
        accelerator: The run's accelerator.
        processor: The image processor, whose settings belong to what is stored.
        folder: Where the store is, or will be.
        dtype: As in :class:`StoreSpec`.
        prefix: Index k of a block: the sequence that comes in there is stored as well, and training begins with it.
        batch_size: Images in one pass.
        progress: Show a bar.

    Raises:
        ValueError: The objective has no targets, a term's change from step to step, or so do the images, or what comes
            before block ``prefix``.
        StoreError: The folder holds something else, or the disk cannot hold the targets.
    """
    if isinstance(objective, Term):
        objective = WeightedTerms([(objective, 1.0)])
    if not isinstance(objective, WeightedTerms):
        raise ValueError(f"the objective {objective.name!r} asks the frozen base for nothing that could be stored")
    if getattr(dataset, "augmentation", None) is not None:
        raise ValueError("images that change at random have no targets that could be stored; leave augmentation out")
    one, again = (dataset[0]["pixel_values"] for _ in range(2))
    if not torch.equal(one.nan_to_num(), again.nan_to_num()):
        raise ValueError(
            "the training images change whenever they are read, and have no targets that could be stored: give an "
            "image processor without random steps, or leave the store out"
        )
    unfit = [term.name for term, _ in objective.terms if not term.storable]
    if unfit:
        raise ValueError(
            f"targets of {', '.join(unfit)} are other ones in every step and cannot be stored; leave the store out"
        )
    tower, layer = tower_of(accelerator.unwrap_model(model))
    if prefix is not None:
        check_prefix(tower, layer, prefix)
    compute_some = partial(_compute, objective, model, dataset, device=accelerator.device, prefix=prefix)
    seconds = None
    if (Path(folder) / STORE_NAME).exists():
        shapes = dict(read_spec(folder).shapes)
    else:
        began = time.perf_counter()
        first = compute_some(range(1))
        seconds = (time.perf_counter() - began) * len(dataset) / accelerator.num_processes
        shapes = {name: tuple(value.shape[1:]) for name, value in first.items()}
    source = {
        "base": TowerIdentity.of(tower).to_dict(),
        "processor": settings_of(processor),
        "terms": objective.details(),
        **({"prefix": prefix} if prefix is not None else {}),
    }
    spec = StoreSpec(len(dataset), shapes, source, dtype)
    with accelerator.main_process_first():
        store = FeatureStore(folder, spec)
    missing = store.missing
    if missing and accelerator.is_main_process:
        time_needed = f", about {seconds:.0f} s" if seconds is not None else ""
        logger.info("targets of %d images go to %s: %s%s", len(dataset), folder, size_text(spec.nbytes), time_needed)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    shown = progress and accelerator.is_local_main_process and bool(mine)
    total = sum(len(store.images_of(shard)) for shard in mine)
    with tqdm(total=total, desc="targets", unit="image", disable=not shown) as bar:

        def compute(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
            parts = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
            done = []
            for part in parts:
                done.append(compute_some(part))
                bar.update(len(part))
            return {name: torch.cat([values[name] for values in done]) for name in shapes}

        error = store.fill(compute, mine)
    if mine:
        logger.info("targets are stored as %s, with a relative error of at most %.2g", dtype, error)
    accelerator.wait_for_everyone()
    stored = StoredTargets(dataset, store)
    if not missing:  # another run's: before hours are spent on it
        for index in range(0, len(dataset), max(1, len(dataset) // _COMPARED)):
            stored[index]
    return stored


def _compute(
    objective: WeightedTerms,
    model: nn.Module,
    dataset: Any,
    numbers: Sequence[int],
    *,
    device: torch.device,
    prefix: int | None,
) -> dict[str, torch.Tensor]:
    batch = objective.collate([{"index": number, **dataset[number]} for number in numbers])
    sketches = torch.stack([_sketch_of(pixels) for pixels in batch["pixel_values"]])
    on_device = {name: value.to(device) for name, value in batch.items()}
    if prefix is None:
        targets = objective.targets(model, on_device)
    else:
        with keep_layer(tower_of(model)[0], prefix) as kept:
            read_base(model, on_device)
        targets = {prefix_key(prefix): kept[0], **objective.targets(model, on_device)}
    return {_SKETCH: sketches, **{name: value.cpu() for name, value in targets.items()}}


def _sketch_of(pixels: torch.Tensor) -> torch.Tensor:
    """Means ``(3 * 16,)`` of the cells of a grid over pixel values ``(3, H, W)``."""
    return F.adaptive_avg_pool2d(pixels.float(), _CELLS).flatten()
