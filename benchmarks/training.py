"""What an epoch of label-free training costs: the published procedure, and ours with and without stores.

    python benchmarks/training.py --out benchmarks/results/training-cpu.json

A DINOv2 of one of the shapes with random weights: what is measured is time and memory, which do not depend on what
weights mean. Every variant runs an epoch over the same images in one process, in turns:

* ``published``: a frozen teacher sees 10 views of every image in every epoch, and the student learns their mean mapped
  back; written from the description of "Vision Transformers with Self-Distilled Registers" (arXiv 2505.21501): whole
  patches of shift, flips, white padding; registers, position embeddings, patch convolution and the last block move.
* ``plain``: our distillation with 10 views and nothing stored; registers move.
* ``first``: the same with a target store, its filling and the first epoch.
* ``store``: any later epoch with that store.
* ``prefix``: registers enter at half the depth, and the sequence that comes in there is stored as well.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from measuring import memory, take_turns
from one_case import Case, build, compare, options, parse, write
from overhead import PATCH, SHAPES
from torch.nn import functional as F

from register_adapter.training import DistillationObjective, wrap
from register_adapter.training.objectives.stored import store_targets

VIEWS = 10
#: (a, b): time of a over time of b, and the most it may be.
LIMITS = {("store", "published"): 1 / 5, ("prefix", "store"): 1 / 1.5, ("first", "published"): 1.1}


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    """Noise, ready for the model."""

    def __init__(self, count: int, size: int) -> None:
        self.pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "index": index}


class Published:
    """Teacher and student of the published procedure."""

    def __init__(self, case: Case, registers: int = 16) -> None:
        self.teacher = build(case).requires_grad_(False)
        self.student = copy.deepcopy(self.teacher)
        width = self.student.config.hidden_size
        self.registers = torch.nn.Parameter(torch.randn(registers, width, device=case.device) / width**0.5)
        embeddings = self.student.embeddings
        moved = [embeddings.patch_embeddings.projection, self.student.encoder.layer[-1]]
        for part in moved:
            part.requires_grad_(True)
        embeddings.position_embeddings.requires_grad_(True)
        self.generator = torch.Generator().manual_seed(0)

    @property
    def trained(self) -> list[torch.Tensor]:
        """The parameters that move."""
        return [self.registers, *(value for value in self.student.parameters() if value.requires_grad)]

    @torch.no_grad()
    def targets(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(B, P, D)``: the mean of the teacher's tokens over the views that show a patch."""
        side = pixels.shape[-1] // PATCH
        reach = max(1, int(0.15 * side))
        total, count = pixels.new_zeros(()), pixels.new_zeros(())
        for number in range(VIEWS):
            down, right = (
                torch.randint(-reach, reach + 1, (2,), generator=self.generator).tolist() if number else (0, 0)
            )
            flipped = bool(number) and bool(torch.randint(2, (1,), generator=self.generator))
            seen = F.pad(pixels, (reach * PATCH,) * 4, value=1.0)
            top, left = ((reach + move) * PATCH for move in (down, right))
            view = seen[..., top : top + pixels.shape[-2], left : left + pixels.shape[-1]]
            view = view.flip(-1) if flipped else view
            tokens = self.teacher(view).last_hidden_state[:, 1:].unflatten(1, (side, side))
            tokens = tokens.flip(2) if flipped else tokens
            canvas = tokens.new_zeros(len(tokens), side + 2 * reach, side + 2 * reach, tokens.shape[-1])
            valid = tokens.new_zeros(side + 2 * reach, side + 2 * reach, 1)
            rows, columns = (slice(reach + move, reach + move + side) for move in (down, right))
            canvas[:, rows, columns], valid[rows, columns] = tokens, 1
            inner = slice(reach, reach + side)
            total = total + canvas[:, inner, inner]
            count = count + valid[inner, inner]
        return (total / count).flatten(1, 2)

    def loss(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(1 - cosine) + MSE`` to the targets."""
        targets = self.targets(pixels)
        hidden = self.student.embeddings(pixels)
        hidden = torch.cat([self.registers.to(hidden).expand(len(pixels), -1, -1), hidden], 1)
        for block in self.student.encoder.layer:
            output = block(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        patches = self.student.layernorm(hidden)[:, len(self.registers) + 1 :]
        return 1 - F.cosine_similarity(patches, targets, dim=-1).mean() + F.mse_loss(patches, targets)


def epoch(step: Callable[[Any], torch.Tensor], trained: list[torch.Tensor], batches: Any) -> None:
    """One pass over the images with AdamW."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for batch in batches:
        step(batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def make_calls(case: Case, scratch: Path, workers: int = 0) -> dict[str, Callable[[], None]]:
    """An epoch of each variant, by its name."""
    images, accelerator = Images(case.images, case.size), Accelerator(cpu=case.device == "cpu")
    half = SHAPES[case.model][1] // 2
    published, dtype = Published(case), getattr(torch, case.dtype)
    number = iter(range(10**6))

    def batches(data: Any, collate: Any = None) -> Any:
        loader = torch.utils.data.DataLoader(
            data, case.batch, collate_fn=collate, num_workers=workers, pin_memory=case.device != "cpu"
        )
        for batch in loader:
            yield {name: value.to(case.device, non_blocking=True) for name, value in batch.items()}

    def ours(store: Path | None, block: int) -> Callable[[], None]:
        objective = DistillationObjective(VIEWS)
        model = wrap(build(case), objective, num_registers=4, insert_layer=block).train()
        trained = [value for value in model.parameters() if value.requires_grad]

        def call() -> None:
            data: Any = images
            if store is not None:
                folder = store if store.name != "new" else scratch / f"new-{next(number)}"
                data = store_targets(
                    *(objective, model, images, accelerator),
                    folder=folder,
                    prefix=block or None,
                    batch_size=case.batch,
                    progress=False,
                )
            epoch(lambda batch: objective.loss(model, batch)[0], trained, batches(data, objective.collate))

        return call

    return {
        "published": lambda: epoch(
            lambda batch: published.loss(batch["pixel_values"].to(dtype)), published.trained, batches(images)
        ),
        "plain": ours(None, 0),
        "first": ours(scratch / "new", 0),
        "store": ours(scratch / "store", 0),
        "prefix": ours(scratch / "prefix", half),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, write the report, and return it."""
    parser = options(__doc__, "training", images=32, repeats=3)
    parser.add_argument("--workers", type=int, default=0, help="processes that load images and targets")
    args = parse(parser, argv)
    started, case = time.time(), Case.of(args)
    with tempfile.TemporaryDirectory() as name:
        calls = make_calls(case, Path(name), args.workers)
        pairs = [*LIMITS, ("plain", "published")]
        turns = take_turns(calls, pairs, torch.device(case.device).type, args.repeats, 0.0, args.budget)
        write_all(args, case, turns, {}, started)  # counting bytes takes as long again on a CPU, and may be stopped
        peaks = {
            name: memory(call, [], [], case.device, compiled=False)["activation_peak"] for name, call in calls.items()
        }
    return write_all(args, case, turns, peaks, started)


def write_all(
    args: argparse.Namespace, case: Case, turns: dict[str, Any], peaks: Mapping[str, int | None], started: float
) -> dict[str, Any]:
    """Write the report of times and, if they are known, of bytes; return it."""
    medians = {name: values["median"] for name, values in turns["milliseconds"].items()}
    speed = {name: round(1000 * case.images / value, 2) for name, value in medians.items()}
    targets = [
        compare(first, second, turns["ratios"][f"{first}/{second}"]["median"], limit)
        for (first, second), limit in LIMITS.items()
    ]
    results = [asdict(case) | turns | {"images_per_second": speed, "peak_bytes": peaks}]
    return write("training", args, results, targets, started)


if __name__ == "__main__":
    for target in main()["targets"]:
        said = "reached" if target["passed"] else "missed"
        sys.stdout.write(f"{target['target']}: {target['value']:.3f}, at most {target['limit']:.3f}: {said}\n")
