"""What 8-bit weights and activations cost a model with artifacts, and whether registers help.

    pip install torchao
    python benchmarks/quantised.py --out benchmarks/results/quantised.json --table docs/results.md
    python benchmarks/quantised.py --grown FOLDER --seeds 0 1 2 --out ...    # grown by scripts/grow_testbed.py

A row is one arm on one model: its linear layers of all blocks become int8 (torchao; weights with a scale per output
channel, symmetric), and their inputs are rounded to int8 on the way, with one scale for a whole batch (*per tensor*) or
one for each token (*per token*). The patch embedding, norms, attention products, heads, registers and LoRA stay in
float32. Errors are those of patch tokens behind the final LayerNorm against the same arm in float32: root of the sum of
squares over that of the tokens; and the task with its frozen head, before and after. Arms are those of the repair
benchmarks, with their controls: random and zero registers, LoRA alone, and the twin that never had artifacts.

Rows are written as they come; what is in the file already, of the same config, is not run again.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import grown_repair
import grown_ruler
import torch
from measuring import describe_machine, hardware_name
from repair import TEST_SEED, TRAIN_SEED
from repair_arms import ARMS as PLANTED_ARMS
from repair_models import CASES, pixels_of
from tables import cell, merge_rows, put_between, row_key, write_report
from tqdm.auto import tqdm

from register_adapter import find_tower
from register_adapter.testbed.grown import RECIPES, weighted_error
from register_adapter.training.objectives.tokens import read_tokens

__all__ = ["main", "make_table"]

BATCH = 32
TWIN = "twin without artifacts"
#: Arms of the benchmark of grown models, and of that of planted ones.
GROWN = (
    "as it grew",
    "1 random register",
    "4 random registers",
    "1 zero register",
    "zeroed neurons",
    "test-time: 1 register",
    "test-time: attention bias",
    "smooth: LoRA alone",
    "smooth: registers + LoRA",
)
PLANTED = (
    "planted model",
    "4 random registers",
    "1 zero register",
    "zeroed neurons",
    "test-time register",
    "test-time attention bias",
    "silenced teacher: LoRA alone",
    "silenced teacher: registers + LoRA",
)
#: Heading, key of a row, digits and factor.
_COLUMNS = (
    ("error per tensor, %", "error_per_tensor", 2, 100.0),
    ("error per token, %", "error_per_token", 2, 100.0),
    ("task, float32", "task", 2, 1.0),
    ("task, per tensor", "task_per_tensor", 2, 1.0),
    ("task, per token", "task_per_token", 2, 1.0),
)


def quantise(model: Any, per_token: bool) -> Any:
    """A copy whose linear layers in the blocks are int8; adapters on them stay as they are."""
    from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        PerTensor,
        quantize_,
    )

    copied = copy.deepcopy(model)
    blocks = {id(part) for block in find_tower(copied).part("blocks") for part in block.modules()}
    config = Int8DynamicActivationInt8WeightConfig(granularity=[PerRow() if per_token else PerTensor(), PerRow()])

    def wanted(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and id(module) in blocks and "lora_" not in name

    quantize_(copied, config, wanted)
    return copied


@torch.no_grad()
def tokens_of(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """Patch tokens behind the final LayerNorm ``(B, P, D)``, and the output of every batch."""
    read = [read_tokens(model.eval(), {"pixel_values": part}) for part in torch.split(pixels, BATCH)]
    return torch.cat([tokens.patches for tokens in read]), [tokens.output for tokens in read]


def measure(model: Any, pixels: torch.Tensor, task: Callable[[torch.Tensor, list[Any]], float]) -> dict[str, float]:
    """The numbers of a row."""
    plain, outputs = tokens_of(model, pixels)
    row = {"task": task(plain, outputs)}
    for name, per_token in (("per_tensor", False), ("per_token", True)):
        rounded, outputs = tokens_of(quantise(model, per_token), pixels)
        row[f"error_{name}"] = float((rounded - plain).norm() / plain.norm())
        row[f"task_{name}"] = task(rounded, outputs)
    return {key: round(value, 5) for key, value in row.items()}


def grown_rows(args: argparse.Namespace, done: set[tuple[str, str, int]]) -> Iterator[dict[str, Any]]:
    """Arms of grown models; the task is their own loss, in thousandths."""
    for seed in args.seeds:
        for recipe in RECIPES:
            task = RECIPES[recipe].task
            drawn = task.draw(args.images, grown_ruler.TEST_SEED)
            for arm in (*GROWN, TWIN):
                if (arm, recipe, seed) in done:
                    continue
                base, twin = grown_repair.load_pair(recipe, seed, args.grown)
                torch.manual_seed(seed)
                is_twin = arm == TWIN
                model = twin.backbone if is_twin else grown_repair.ARMS[arm](base, task, seed, args.steps)
                head = (twin if is_twin else base).head

                def loss(tokens: torch.Tensor, _: Any, head: Any = head, drawn: Any = drawn) -> float:
                    return 1000 * float(weighted_error(head(tokens), drawn.targets, drawn.weights, (-1, -2)).detach())

                yield {"arm": arm, "model": recipe, "seed": seed, **measure(model, drawn.pixel_values, loss)}


def planted_rows(args: argparse.Namespace, done: set[tuple[str, str, int]]) -> Iterator[dict[str, Any]]:
    """Arms of the planted ViT; the task is its accuracy, in per cent."""
    arms = {arm.name: arm for arm in PLANTED_ARMS}
    name = "shipped ViT"
    left = [(seed, arm) for seed in args.seeds for arm in (*PLANTED, TWIN) if (arm, name, seed) not in done]
    if not left:
        return
    case = CASES["shipped"]()
    pixels, labels = pixels_of(args.images, TEST_SEED, "test")

    def accuracy(_: Any, outputs: list[Any]) -> float:
        return 100 * float((torch.cat([output.logits for output in outputs]).argmax(-1) == labels).float().mean())

    for seed, arm in left:
        torch.manual_seed(seed)
        given = pixels_of(args.steps * 16, TRAIN_SEED + seed)
        model = case.twin if arm == TWIN else arms[arm].make(case, *given, seed)
        yield {"arm": arm, "model": name, "seed": seed, **measure(model, pixels, accuracy)}


def make_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: a table a model, means over seeds with the range."""
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        heads = ["arm", *(heading for heading, *_ in _COLUMNS), "seeds"]
        lines += ["", f"**{name}**", "", "| " + " | ".join(heads) + " |", "| --- |" + " --- |" * (len(heads) - 1)]
        for arm in dict.fromkeys(row["arm"] for row in mine):
            seeds = [row for row in mine if row["arm"] == arm]
            cells = [cell([row[key] for row in seeds], digits, factor) for _, key, digits, factor in _COLUMNS]
            lines.append(f"| {arm} | " + " | ".join(cells) + f" | {len(seeds)} |")
    return [*lines, ""]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is not in the report yet, write it and the table, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--grown", type=Path, help="folder that scripts/grow_testbed.py wrote, for other seeds than 0")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of 16 images where anything is trained")
    parser.add_argument("--images", type=int, default=128, help="held-out images that are measured")
    parser.add_argument("--out", type=Path, default=Path("quantised.json"))
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    args = parser.parse_args(argv)
    try:
        torchao = version("torchao")
    except PackageNotFoundError:
        parser.error("torchao, which quantises, is not installed: pip install torchao")
    warnings.filterwarnings("ignore")
    config = {"steps": args.steps, "images": args.images, "batch": BATCH}
    rows = merge_rows([args.out], config)
    report = {"benchmark": "quantised", "config": config, **describe_machine(), "torchao": torchao, "rows": rows}
    done = {row_key(row) for row in rows}
    total = len(args.seeds) * (len(RECIPES) * (len(GROWN) + 1) + len(PLANTED) + 1)
    with tqdm(total=total, initial=len(done), unit="arm") as bar:
        for make in (grown_rows, planted_rows):
            for row in make(args, done):
                bar.set_postfix_str(f"{row['model']}, seed {row['seed']}, {row['arm']}")
                bar.update()
                rows.append({**row, "hardware": hardware_name()})
                write_report(report, args.out)
    if args.table:
        put_between(args.table, "quantised", make_table(rows))
    return report


if __name__ == "__main__":
    sys.stdout.write(f"{len(main()['rows'])} rows\n")
