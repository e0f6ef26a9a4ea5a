"""Ablations on models whose artifacts grew by themselves: one command a question, its variants in a config file.

    python benchmarks/ablations.py benchmarks/ablations/num_registers.json --docs docs
    python benchmarks/ablations.py benchmarks/ablations --grown FOLDER --docs docs    # every config of the folder

A config names the grown models (``models``), their seeds, steps of 16 images, the label-free objective, and
``variants``: options of ``register_adapter.training.wrap``, and how registers start (``start``: ``"outliers"`` or
``"test_time"``), or the options of a fit alone (``fit``). ``training_seeds`` train one model, seed 0, several times;
otherwise a model's seed is that of its training too. What is measured is that of ``grown_repair.py``, on its held-out
images.
A config with ``flops`` counts the operations of a forward pass in place of that (torch's counter, random weights).

A report is written into ``benchmarks/results/ablation-NAME.json``, row by row: what is there already is not run again.
``--docs`` writes tables into ``ablations.md``, and plots into ``images/``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import grown_repair
import grown_ruler
import torch
from measuring import describe_machine, hardware_name
from overhead import SHAPES
from tables import cell, put_between, read_rows, row_key, write_report
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTModel

from register_adapter import add_registers, fit_test_time_registers
from register_adapter.neurons import start_from, start_from_outliers
from register_adapter.testbed.grown import RECIPES, GrownModel, MosaicTask
from register_adapter.training import TrainArguments, train, wrap
from register_adapter.tuner.config import RegisterConfig
from register_adapter.tuner.layer import require_register_layer

__all__ = ["draw", "main", "write_table"]

RESULTS = Path(__file__).parent / "results"
#: Heading, key of a row, digits and factor; those of the plots first.
COLUMNS = (
    ("outliers, %", "outlier_share", 2, 100.0),
    ("contents at outliers, R²", "contents_at_outliers", 2, 1.0),
    ("task loss, × 1000", "task_loss", 2, 1000.0),
    ("largest / median", "largest_ratio", 1, 1.0),
    ("attention on background, %", "attention_on_background", 0, 100.0),
)


def make_variant(variant: dict[str, Any], base: GrownModel, task: MosaicTask, seed: int, config: dict[str, Any]) -> Any:
    """The backbone of a variant."""
    images = list(torch.split(task.draw(grown_repair.FIT_IMAGES, grown_repair.FIT_SEED).pixel_values, 32))
    if "fit" in variant:
        return fit_test_time_registers(base.backbone, images, progress=False, **variant["fit"])
    options, start = dict(variant.get("wrap", {})), None
    if variant.get("start") == "test_time":
        fitted = fit_test_time_registers(base.backbone, images, progress=False)
        start = start_from(fitted)
        base.backbone = fitted.unload()
    elif variant.get("start") == "outliers":
        start = start_from_outliers(base.backbone, images, num_registers=options["num_registers"], seed=seed)
    aim = grown_repair.LABEL_FREE[config["objective"]](base)
    model = wrap(base.backbone, aim, **(options | (start.options if start else {})))
    if start is not None:
        (name,) = [name for name, given in model.peft_config.items() if isinstance(given, RegisterConfig)]
        start.fill(require_register_layer(model).tokens(name))
    arguments = TrainArguments(
        per_device_train_batch_size=16,
        max_train_steps=config["steps"],
        learning_rate=1e-3 if "lora" in options.get("train", "") else 2e-2,
        lr_scheduler_type="cosine",
        num_warmup_steps=5,
        seed=seed,
        use_cpu=True,
        quiet=True,
    )
    train(model, aim, grown_repair.Images(task, 16 * config["steps"], grown_repair.TRAIN_SEED + seed), arguments)
    return model


def run_variants(config: dict[str, Any], grown: Path | None, done: set[Any]) -> Iterator[dict[str, Any]]:
    """A row a variant, model and seed."""
    cases = [(0, seed) for seed in config.get("training_seeds", ())] or [(seed, seed) for seed in config["seeds"]]
    for name in config["models"]:
        task = RECIPES[name].task
        for model_seed, seed in cases:
            ruler = None
            for label, variant in config["variants"].items():
                if (label, name, seed) in done:
                    continue
                base, twin = grown_repair.load_pair(name, model_seed, grown)
                ruler = ruler or grown_ruler.Ruler(base, twin, task, config["images"])
                torch.manual_seed(seed)
                started = time.perf_counter()
                model = make_variant(variant, base, task, seed, config)
                seconds = round(time.perf_counter() - started, 1)
                row = {"variant": label, "model": name, "seed": seed, **ruler.measure(model, base.head)}
                yield row | {"seconds": seconds}


def count_flops(config: dict[str, Any], grown: Path | None, done: set[Any]) -> Iterator[dict[str, Any]]:
    """A row a model shape and what registers it has; ``"insert_layer": "half"`` is half the depth."""
    size = config["flops"]["size"]
    for patch, shape in product(config["flops"]["patch_sizes"], config["flops"]["shapes"]):
        width, blocks, heads = SHAPES[shape]
        sizes = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads}
        made = ViTConfig(**sizes, intermediate_size=4 * width, image_size=size, patch_size=patch)
        for label, options in config["flops"]["variants"].items():
            name = f"ViT-{shape.upper()}/{patch}"
            if (label, name, 0) in done:
                continue
            if options.get("insert_layer") == "half":
                options = options | {"insert_layer": blocks // 2}
            model: Any = ViTModel(made).eval()
            model = add_registers(model, **options) if options else model
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(pixel_values=torch.zeros(1, 3, size, size))
            yield {"variant": label, "model": name, "seed": 0, "flops": counter.get_total_flops()}


def write_table(report: dict[str, Any], page: Path) -> None:
    """Write a table a model between the report's two comments of the page: means over seeds with the range."""
    config, rows = report["config"], report["rows"]
    lines = _flops_table(rows) if "flops" in config else _table(config, rows)
    put_between(page, f"ablation-{config['name']}", lines)


def _table(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        heads = [config["heading"], *(heading for heading, *_ in COLUMNS), "verdicts", "runs"]
        lines += ["", f"**{name}**", "", "| " + " | ".join(heads) + " |", "| --- |" + " --- |" * (len(heads) - 1)]
        for label in config["variants"]:
            runs = [row for row in mine if row["variant"] == label]
            if runs:
                cells = [cell([row[key] for row in runs], digits, factor) for _, key, digits, factor in COLUMNS]
                verdicts = ", ".join(sorted({row["verdict"] for row in runs}))
                lines.append(f"| {label} | " + " | ".join(cells) + f" | {verdicts} | {len(runs)} |")
    return [*lines, ""]


def _flops_table(rows: list[dict[str, Any]]) -> list[str]:
    counts = list(dict.fromkeys(row["variant"] for row in rows))
    lines = ["", "| model | GFLOP without | " + " | ".join(f"{count}" for count in counts[1:]) + " |"]
    lines.append("| --- |" + " --- |" * len(counts))
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = {row["variant"]: row["flops"] for row in rows if row["model"] == name}
        more = [f"+{100 * (mine[count] / mine[counts[0]] - 1):.2f} %" for count in counts[1:]]
        lines.append(f"| {name} | {mine[counts[0]] / 1e9:.1f} | " + " | ".join(more) + " |")
    return [*lines, ""]


def draw(report: dict[str, Any], folder: Path) -> None:
    """Three panels: outliers, contents at outliers, and the task's loss; means over runs with the range.

    Args:
        report: Its ``config`` and ``rows``; of operations nothing is drawn.
        folder: Where ``ablation-NAME.png`` goes.
    """
    config, rows = report["config"], report["rows"]
    if "flops" in config:
        return
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for panel, (heading, key, _, factor) in zip(panels, COLUMNS[:3], strict=True):
        for place, name in enumerate(names):
            runs = {
                label: [factor * row[key] for row in rows if (row["variant"], row["model"]) == (label, name)]
                for label in config["variants"]
            }
            runs = {label: values for label, values in runs.items() if values}
            means = [sum(values) / len(values) for values in runs.values()]
            below = [mean - min(values) for mean, values in zip(means, runs.values(), strict=True)]
            above = [max(values) - mean for mean, values in zip(means, runs.values(), strict=True)]
            where = [list(config["variants"]).index(label) + 0.12 * (place - (len(names) - 1) / 2) for label in runs]
            panel.errorbar(where, means, yerr=[below, above], marker="o", linestyle="none", capsize=3, label=name)
        panel.set_xticks(range(len(config["variants"])), list(config["variants"]), rotation=20, ha="right", fontsize=8)
        panel.set_title(heading, fontsize=10)
        panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
        panel.grid(axis="y", alpha=0.3)
    if len(names) > 1:
        panels[0].legend(fontsize=8)
    figure.supxlabel(config["heading"], fontsize=9)
    figure.savefig(folder / f"ablation-{config['name']}.png", dpi=110)
    plt.close(figure)


def run(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One config: its report, and with ``--docs`` its table and plot."""
    config = json.loads(path.read_text("utf-8"))
    out = args.results / f"ablation-{config['name']}.json"
    rows = read_rows(out, config)
    report = {"benchmark": "ablation", "config": config, **describe_machine(), "rows": rows}
    run_rows = count_flops if "flops" in config else run_variants
    with tqdm(desc=config["name"], initial=len(rows), unit="row") as bar:
        for row in run_rows(config, args.grown, {row_key(row) for row in rows}):
            rows.append({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
            rows[-1]["hardware"] = hardware_name()
            write_report(report, out)
            bar.update()
    if args.docs:
        write_table(report, args.docs / "ablations.md")
        draw(report, args.docs / "images")
    return report


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what is not in the reports yet, write them, tables and plots, and return the reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+", help="config files, or folders of them")
    parser.add_argument("--grown", type=Path, help="folder that scripts/grow_testbed.py wrote, for other seeds than 0")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the reports")
    parser.add_argument(
        "--merge", type=Path, nargs="+", default=[], help="folders of reports whose rows are taken over"
    )
    parser.add_argument("--docs", type=Path, help="folder of ablations.md")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    paths = [file for path in args.configs for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    return [run(path, args) for path in paths]


if __name__ == "__main__":
    for done in main():
        sys.stdout.write(f"{done['config']['name']}: {len(done['rows'])} rows\n")
