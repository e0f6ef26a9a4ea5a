"""Are artifacts that grew by themselves repaired, and at what cost for the task?

    python benchmarks/grown_repair.py --out benchmarks/results/grown-repair.json --table docs/grown.md
    python benchmarks/grown_repair.py --grown FOLDER --seeds 0 1 2 3 4 --out ...    # grown by scripts/grow_testbed.py

A row is one arm on one model. On held-out images: the task's own loss with the frozen head; the largest patch norm
over the median and the share of patches over 3 medians, each in the block with most, before the final LayerNorm;
attention that patches give to background tiles, in the block with most; how well a linear probe reads a tile's own
contents (R²) where the model without registers has its outliers, and elsewhere; cosine of patch tokens behind the final
LayerNorm to those of the twin that had registers from the start, after the rotation that fits best on other images; the
audit's verdict, and how many heads have attention sinks on patches and on registers, of which kind. Controls: random
and zero registers, and LoRA alone. The ceiling is that twin, with its own head.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grown_ruler import Ruler, say_sinks
from measuring import describe_machine, hardware_name
from tables import cell, merge_rows, put_between, row_key, write_report
from tqdm.auto import tqdm

from register_adapter import add_registers, find_tower, fit_test_time_registers
from register_adapter.neurons import start_from_outliers
from register_adapter.testbed.grown import RECIPES, GrownModel, MosaicTask, load_grown, read_grown, weighted_error
from register_adapter.training import (
    DistillationObjective,
    NormObjective,
    PreservationObjective,
    RefinementObjective,
    SmoothObjective,
    Term,
    TrainArguments,
    WeightedTerms,
    train,
    wrap,
)
from register_adapter.tuner.layer import require_register_layer

__all__ = [
    "ARMS",
    "FIT_IMAGES",
    "FIT_SEED",
    "LABEL_FREE",
    "TRAIN_SEED",
    "Images",
    "load_pair",
    "main",
    "make_table",
]

#: Seeds of the images that are trained on (plus the run's), and fitted on.
TRAIN_SEED, FIT_SEED = 50_000, 60_001
FIT_IMAGES = 128


class OwnTask(Term):
    """The loss that the model grew on, with its frozen head."""

    name = "own_task"
    needs = ("wanted", "weights")
    storable = False

    def __init__(self, head: torch.nn.Linear) -> None:
        self.head = head

    def targets(self, teacher: Any) -> dict[str, torch.Tensor]:
        """Nothing of the base."""
        return {}

    def measure(self, model: Any, student: Any, targets: Any, batch: Any) -> torch.Tensor:
        """The loss of each image, ``(B,)``."""
        return weighted_error(self.head(student.patches), batch["wanted"], batch["weights"])


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    """Drawn images with what is asked, as items."""

    def __init__(self, task: MosaicTask, count: int, seed: int) -> None:
        drawn = task.draw(count, seed)
        self.pixels, self.wanted, self.weights = drawn.pixel_values, drawn.targets, drawn.weights

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "pixel_values": self.pixels[index],
            "wanted": self.wanted[index],
            "weights": self.weights[index],
            "index": index,
        }


def _fit(**options: Any) -> Callable[..., Any]:
    def make(model: GrownModel, task: MosaicTask, seed: int, steps: int) -> Any:
        pixels = task.draw(FIT_IMAGES, FIT_SEED).pixel_values
        return fit_test_time_registers(model.backbone, list(torch.split(pixels, 32)), progress=False, **options)

    return make


def _zeroed(model: GrownModel, task: MosaicTask, seed: int, steps: int) -> Any:
    fitted = _fit()(model, task, seed, steps)
    units = dict(fitted.peft_config["default"].register_neurons)
    base = fitted.unload()
    for block, members in units.items():
        find_tower(base).block_part(block, "mlp_out").weight[:, members] = 0
    return base


def _trained(
    make_aim: Callable[[GrownModel], Any],
    rate: float,
    options: dict[str, Any] | None = None,
    from_outliers: bool = False,
) -> Any:
    def make(model: GrownModel, task: MosaicTask, seed: int, steps: int) -> Any:
        aim = make_aim(model)
        start = None
        if from_outliers:
            pixels = task.draw(FIT_IMAGES, FIT_SEED).pixel_values
            start = start_from_outliers(model.backbone, list(torch.split(pixels, 32)), seed=seed)
        wrapped = wrap(model.backbone, aim, **(start.options if start else options or {}))
        if start:
            start.fill(require_register_layer(wrapped).tokens("default"))
        arguments = TrainArguments(
            per_device_train_batch_size=16,
            max_train_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            num_warmup_steps=5,
            seed=seed,
            use_cpu=True,
            quiet=True,
        )
        train(wrapped, aim, Images(task, 16 * steps, TRAIN_SEED + seed), arguments)
        return wrapped

    return make


def _own(model: GrownModel) -> Any:
    return OwnTask(model.head)


_FOUR = {"num_registers": 4}
_LORA = {"train": "registers+lora", **_FOUR}
LABEL_FREE: dict[str, Callable[[GrownModel], Any]] = {
    "distillation": lambda model: DistillationObjective(num_views=4),
    "refine": lambda model: RefinementObjective(),
    "smooth": lambda model: SmoothObjective(),
    "norm+preserve": lambda model: WeightedTerms([(NormObjective(), 1.0), (PreservationObjective(), 1.0)]),
}
#: Name of an arm to what makes its backbone from the grown model, its task, a seed and a number of steps.
ARMS: dict[str, Callable[[GrownModel, MosaicTask, int, int], Any]] = {
    "as it grew": lambda model, *_: model.backbone,
    "1 random register": lambda model, *_: add_registers(model.backbone, 1),
    "4 random registers": lambda model, *_: add_registers(model.backbone, 4),
    "1 zero register": lambda model, *_: add_registers(model.backbone, 1, init="zeros"),
    "zeroed neurons": _zeroed,
    "test-time: 1 register": _fit(),
    "test-time: 4 registers": _fit(num_registers=4),
    "test-time: attention bias": _fit(attention_bias=True),
    **{f"{name}: registers": _trained(aim, 2e-2, _FOUR) for name, aim in LABEL_FREE.items()},
    **{f"{name}: registers + LoRA": _trained(aim, 1e-3, _LORA) for name, aim in LABEL_FREE.items()},
    "smooth: LoRA alone": _trained(LABEL_FREE["smooth"], 1e-3, {"train": "lora"}),
    "own task: registers": _trained(_own, 2e-2, _FOUR),
    "own task: registers from outliers": _trained(_own, 2e-2, from_outliers=True),
    "own task: deep registers": _trained(_own, 2e-2, {**_FOUR, "deep": True}),
    "own task: key/value registers": _trained(_own, 2e-2, {**_FOUR, "key_value": True}),
    "own task: registers + gates": _trained(_own, 2e-2, {**_FOUR, "train": "registers+gates"}),
    "own task: registers + LoRA": _trained(_own, 1e-3, _LORA),
    "own task: LoRA alone": _trained(_own, 1e-3, {"train": "lora"}),
    "own task: registers + last block": _trained(_own, 1e-3, {**_FOUR, "train": "registers+last_blocks=1"}),
}


def load_pair(recipe: str, seed: int, grown: Path | None) -> tuple[GrownModel, GrownModel]:
    """A grown model and its twin with registers."""
    if seed == 0 and grown is None:
        return load_grown(recipe), load_grown(recipe, "registers")
    if grown is None:
        raise SystemExit(
            f"seed {seed} is not packaged; grow it with scripts/grow_testbed.py and name its folder, --grown"
        )
    return read_grown(grown / recipe / f"seed-{seed}"), read_grown(grown / f"{recipe}-registers" / f"seed-{seed}")


#: Heading, key of a row, digits and factor.
_COLUMNS = (
    ("task loss, × 1000", "task_loss", 2, 1000.0),
    ("largest / median", "largest_ratio", 1, 1.0),
    ("outliers, %", "outlier_share", 2, 100.0),
    ("attention on background, %", "attention_on_background", 0, 100.0),
    ("contents at outliers, R²", "contents_at_outliers", 2, 1.0),
    ("cosine to the twin", "cosine_twin", 3, 1.0),
)


def make_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: a table a task, means over seeds with the range."""
    lines = []
    for recipe in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == recipe]
        sinks = ["sinks on patches, heads", "sinks on registers, heads"]
        heads = ["arm", *(heading for heading, *_ in _COLUMNS), *sinks, "verdicts", "seeds"]
        lines += ["", f"**{recipe}**", "", "| " + " | ".join(heads) + " |", "| --- |" + " --- |" * (len(heads) - 1)]
        for arm in dict.fromkeys(row["arm"] for row in mine):
            seeds = [row for row in mine if row["arm"] == arm]
            cells = [cell([row[key] for row in seeds], digits, factor) for _, key, digits, factor in _COLUMNS]
            cells += [say_sinks(seeds, place) for place in ("patches", "registers")]
            verdicts = ", ".join(sorted({row["verdict"] for row in seeds}))
            lines.append(f"| {arm} | " + " | ".join(cells) + f" | {verdicts} | {len(seeds)} |")
    return [*lines, ""]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is not in the report yet, write it and the table, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--grown", type=Path, help="folder that scripts/grow_testbed.py wrote, for other seeds than 0")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of 16 images")
    parser.add_argument("--images", type=int, default=128, help="held-out images that are measured")
    parser.add_argument("--out", type=Path, default=Path("grown-repair.json"))
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="take over these reports' rows, run nothing")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    config = {"steps": args.steps, "batch": 16, "images": args.images}
    rows = merge_rows([args.out, *args.merge], config)
    rows.sort(key=lambda row: (row["seed"], list(RECIPES).index(row["model"])))
    report = {"benchmark": "grown-repair", "config": config, **describe_machine(), "rows": rows}
    if args.merge:
        args.seeds = []
        write_report(report, args.out)
    done = {row_key(row) for row in rows}
    bar = tqdm(total=len(args.recipes) * len(args.arms) * len(args.seeds), unit="arm")
    for seed in args.seeds:
        for recipe in args.recipes:
            task, ruler = RECIPES[recipe].task, None
            arms = {**{arm: ARMS[arm] for arm in args.arms}, "twin, registers from the start": None}
            for arm, make in arms.items():
                bar.set_postfix_str(f"{recipe}, seed {seed}, {arm}")
                bar.update(make is not None)
                if (arm, recipe, seed) in done:
                    continue
                base, twin = load_pair(recipe, seed, args.grown)
                ruler = ruler or Ruler(base, twin, task, args.images)
                torch.manual_seed(seed)
                started = time.perf_counter()
                model = make(base, task, seed, args.steps) if make else twin.backbone
                seconds = round(time.perf_counter() - started, 1)
                measured = ruler.measure(model, (base if make else twin).head)
                row = {"arm": arm, "model": recipe, "seed": seed, **measured, "seconds": seconds}
                row["hardware"] = hardware_name()
                rows.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
                write_report(report, args.out)
    bar.close()
    if args.table:
        put_between(args.table, "grown-repair", make_table(rows))
    return report


if __name__ == "__main__":
    sys.stdout.write(f"{len(main()['rows'])} rows\n")
