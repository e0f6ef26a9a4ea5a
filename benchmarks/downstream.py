"""Does it help downstream? Every task on the clean twin, the planted model, and the planted model with each repair.

    python benchmarks/downstream.py --out benchmarks/results/downstream.json --table docs/results.md

The shipped ViT, and the tasks of `register-adapter eval` with their default settings but for the number of images and
of the patches that are learned from, and ridge regression for depth, which is quicker. A row is one model with one
seed, which draws all images (those that a repair is fitted or trained on, those that a task learns from, those that it
is measured on) and is that of the training. Arms are those of the repair benchmark. Zero-shot classification is by a
text tower that learned what the clean twin says of images (`text_tower.py`); the repairs are not shown to it.

Rows are written as they come; what is in the file already, of the same config, is not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from measuring import describe_machine, hardware_name
from repair import TRAIN_SEED
from repair_arms import ARMS, TEACHERS, Arm
from repair_models import CASES, pixels_of
from tables import cell, merge_rows, put_between, row_key, write_report
from text_tower import TextTower
from tqdm.auto import tqdm

from register_adapter.evaluation import (
    evaluate_depth,
    evaluate_discovery,
    evaluate_knn,
    evaluate_linear,
    evaluate_segmentation,
    evaluate_zero_shot,
)
from register_adapter.evaluation.discovery import boxed_scenes
from register_adapter.evaluation.downstream import LabelledImages, LinearFeature, distance_scenes, mask_scenes
from register_adapter.testbed import LABELS, SceneDataset, load_image_processor

#: Seeds of the scenes that tasks learn from, are measured on, and that have captions, plus ten times the run's seed.
LEARN_SEED, ASK_SEED, CAPTION_SEED = 40_001, 40_002, 40_003
#: Arms of the repair benchmark that stand here, in the table's order; those of training have what taught them in front.
REPAIRS = (
    "planted model",
    "4 random registers",
    "zeroed neurons",
    "test-time register",
    "test-time attention bias",
    "silenced teacher: LoRA alone",
    "silenced teacher: registers + LoRA",
    "silenced teacher, hard patches: LoRA alone behind",
    "silenced teacher, hard patches: registers + LoRA behind",
)
TWIN, HIDDEN = "clean twin", "hidden test-time register (gate)"
#: Patches of an image that segmentation and depth learn from.
TOKENS = 30
#: Heading, key of a row, factor, digits.
COLUMNS = (
    ("k-NN, %", "knn", 100, 1),
    ("linear, CLS, %", "linear", 100, 1),
    ("linear, CLS + patch mean, %", "linear_mean", 100, 1),
    ("segmentation, mIoU, %", "segmentation", 100, 1),
    ("depth, rmse ↓", "depth", 1, 4),
    ("zero-shot, %", "zero_shot", 100, 1),
    ("LOST, CorLoc, %", "lost", 100, 1),
    ("TokenCut, CorLoc, %", "tokencut", 100, 1),
)


class Scenes:
    """Scenes that are drawn once.

    Args:
        count: How many.
        seed: Their seed.
        split: Whose photographs are behind them.
    """

    def __init__(self, count: int, seed: int, split: Literal["train", "test"]) -> None:
        source = SceneDataset(count, seed=seed, split=split)
        self._scenes = [source.scene(number) for number in range(count)]

    def __len__(self) -> int:
        return len(self._scenes)

    def scene(self, index: int) -> Any:
        """One of them."""
        return self._scenes[index]

    def labelled(self) -> LabelledImages:
        """Images and their classes."""
        return LabelledImages(
            [scene.pil for scene in self._scenes], np.array([scene.label for scene in self._scenes]), LABELS
        )


class Tasks:
    """Every task, on the same images.

    Args:
        learn: Number of images that are learned from.
        ask: Number of images that are measured on.
        captions: Number of images with captions, that the text tower learns from.
        twin: The clean model.
        seed: Of the run.
    """

    def __init__(self, learn: int, ask: int, captions: int, twin: Any, seed: int) -> None:
        sets: Any = Scenes(learn, LEARN_SEED + 10 * seed, "train"), Scenes(ask, ASK_SEED + 10 * seed, "test")
        self._labelled = [part.labelled() for part in sets]
        self._masks = [mask_scenes(part) for part in sets]
        self._distances = [distance_scenes(part) for part in sets]
        self._boxed = boxed_scenes(sets[1])
        self._tower = TextTower(twin, *pixels_of(captions, CAPTION_SEED + 10 * seed), seed)

    def measure(self, model: Any) -> dict[str, float]:
        """A figure for each of :data:`COLUMNS`."""
        common: Any = {"image_processor": load_image_processor()}
        knn = evaluate_knn({"model": model}, *self._labelled, k=(20,), **common)
        wanted = (LinearFeature(1), LinearFeature(4, patch_mean=True))
        linear = evaluate_linear({"model": model}, *self._labelled, features=wanted, **common)
        masks = evaluate_segmentation({"model": model}, *self._masks, tokens_per_image=TOKENS, **common)
        depth = evaluate_depth({"model": model}, *self._distances, head="ridge", tokens_per_image=TOKENS, **common)
        pair = self._tower.beside(model)
        named = evaluate_zero_shot({"model": pair}, self._labelled[1], tokenizer=self._tower.tokenize, **common)
        objects = evaluate_discovery({"model": model}, self._boxed, sweep=None, **common)
        values = [row.score.value for report in (knn, linear, masks, depth, named) for row in report.rows]
        values += [row.corloc.value for row in objects.rows]
        return {key: round(value, 5) for (_, key, *_), value in zip(COLUMNS, values, strict=True)}


def arms() -> list[Arm]:
    """Every line of the table, the clean twin first."""
    there = {arm.name: arm for arm in ARMS}
    hidden = TEACHERS["silenced teacher"]
    chosen = [there[name] for name in REPAIRS]
    place = REPAIRS.index("test-time attention bias") + 1
    return [
        Arm(TWIN, lambda case, *_: case.twin),
        *chosen[:place],
        Arm(HIDDEN, lambda case, pixels, *_: hidden(case, pixels)),
        *chosen[place:],
    ]


def write_table(report: dict[str, Any], path: Path) -> None:
    """Write the table between two comments of the file."""
    rows, config = report["rows"], report["config"]
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"The shipped ViT; seeds {', '.join(map(str, seeds))}; tasks learn from {config['learn']} scenes, "
        f"{config['tokens_per_image']} patches each, and are measured on {config['ask']}; {config['steps']} steps of "
        "16 images where anything is trained (160 with hard patches).",
        "",
        "| model | " + " | ".join(heading for heading, *_ in COLUMNS) + " | seeds |",
        "| --- |" + " --- |" * (len(COLUMNS) + 1),
    ]
    for arm in arms():
        mine = [row for row in rows if row["arm"] == arm.name]
        if mine:
            cells = [cell((row[key] for row in mine), digits, factor) for _, key, factor, digits in COLUMNS]
            lines.append(f"| {arm.name} | " + " | ".join(cells) + f" | {len(mine)} |")
    put_between(path, "downstream", ["", *lines, ""])


def run_arm(arm: Arm, case: Any, tasks: Tasks, pixels: torch.Tensor, labels: torch.Tensor, seed: int) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    model = arm.make(case, pixels, labels, seed).eval()
    made = time.perf_counter()
    numbers = tasks.measure(model)
    seconds = {"seconds": round(made - started, 1), "seconds_of_tasks": round(time.perf_counter() - made, 1)}
    steps = {"steps": arm.steps or len(pixels) // 16} if arm.trained else {}
    return {
        "arm": arm.name,
        "model": case.name,
        "seed": seed,
        **steps,
        **numbers,
        **seconds,
        "hardware": hardware_name(),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is not in the report yet, write it and the table, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in arms()], metavar="ARM", help="default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of 16 images")
    parser.add_argument("--learn", type=int, default=192, help="scenes that tasks learn from")
    parser.add_argument("--ask", type=int, default=128, help="scenes that they are measured on")
    parser.add_argument("--captions", type=int, default=960, help="scenes that the text tower learns from")
    parser.add_argument("--out", type=Path, default=Path("downstream.json"))
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="take over these reports' rows, run nothing")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    config = {"steps": args.steps, "batch": 16, "learn": args.learn, "ask": args.ask, "captions": args.captions}
    config["tokens_per_image"] = TOKENS
    order = [arm.name for arm in arms()]
    rows = merge_rows([args.out, *args.merge], config)
    rows.sort(key=lambda row: (row["seed"], order.index(row["arm"])))
    report = {"benchmark": "downstream", "config": config, **describe_machine(), "rows": rows}
    wanted = [arm for arm in arms() if not args.merge and (not args.arms or arm.name in args.arms)]
    if args.merge:
        write_report(report, args.out)
    done = {(arm, seed) for arm, _, seed in map(row_key, rows)}
    make: Callable[[], Any] = CASES["shipped"]
    with tqdm(total=len(wanted) * len(args.seeds), unit="arm") as bar:
        for seed in args.seeds:
            left = [arm for arm in wanted if (arm.name, seed) not in done]
            bar.update(len(wanted) - len(left))
            if not left:
                continue
            case = make()
            tasks = Tasks(args.learn, args.ask, args.captions, case.twin, seed)
            pixels, labels = pixels_of(args.steps * 16, TRAIN_SEED + seed)
            for arm in left:
                bar.set_postfix_str(f"{arm.name}, seed {seed}")
                report["rows"].append(run_arm(arm, case, tasks, pixels, labels, seed))
                write_report(report, args.out)
                bar.update()
    if args.table:
        write_table(report, args.table)
    return report


if __name__ == "__main__":
    rows = main()["rows"]
    sys.stdout.write(f"{len(rows)} rows\n")
