"""Does it repair? Every objective and what may move, on planted models whose clean twin is known.

    python benchmarks/repair.py --out benchmarks/results/repair.json --table docs/results.md

A row is one arm on one model with one seed: shares of outliers (patch tokens over 3 times the median L2 norm of the
images, last block, before the final LayerNorm), cosines of patch tokens to the clean twin's at the same place and
layer, where artifacts were planted and elsewhere, top-1 accuracy with the frozen head, drift of CLS (1 - cosine, of the
pooled patches where there is no CLS), trained parameters and seconds. Controls are arms as the others: untrained random
registers, a zero register, LoRA alone, registers fitted at test time, zeroed neurons.

Rows are written as they come; what is in the file already, of the same config, is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import describe_machine, hardware_name
from repair_arms import ARMS, Arm
from repair_models import CASES, Case, pixels_of
from repair_table import write_table
from tables import read_rows, row_key, write_report
from torch.nn import functional as F
from tqdm.auto import tqdm

from register_adapter.features.trace import capture
from register_adapter.utils.parameters import trainable_by_part

#: Seeds of the drawn images: those that are trained on (plus the run's seed), fitted on, and measured on.
TRAIN_SEED, TEST_SEED = 101, 20_001


class Ruler:
    """Measures models of one case on the same held-out images.

    Args:
        case: The planted model and its twin.
        count: Number of images.
        seed: Seed of the images.
    """

    def __init__(self, case: Case, count: int, seed: int = TEST_SEED) -> None:
        pixels, self.labels = pixels_of(count, seed, "test")
        self.device, self.batches = case.device, torch.split(pixels, 32)
        self.hits = torch.cat([case.planting.hits(batch) for batch in self.batches])
        self.twin = self._read(case.twin)
        self.before = self._share(self._read(case.base())[0])

    @torch.no_grad()
    def _read(self, model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Patch tokens ``(N, P, D)`` before the final LayerNorm, what stands for an image ``(N, D)``, and classes."""
        patches, summary, classes = [], [], []
        model.eval().to(self.device)
        for batch in self.batches:
            with capture(model, attentions=False) as trace:
                classes.append(model(pixel_values=batch.to(self.device)).logits.argmax(-1).cpu())
            patches.append(trace.patches().float().cpu())
            summary.append(trace.hidden_states[-1][:, 0].float().cpu() if trace.prefix else patches[-1].mean(1))
        return torch.cat(patches), torch.cat(summary), torch.cat(classes)

    @staticmethod
    def _share(patches: torch.Tensor) -> float:
        norms = patches.norm(dim=-1)
        return float((norms > 3 * norms.median()).float().mean())

    def measure(self, model: Any) -> dict[str, float]:
        """The numbers of one row."""
        patches, summary, classes = self._read(model)
        cosine = F.cosine_similarity(patches, self.twin[0], dim=-1)
        return {
            "outlier_share_before": self.before,
            "outlier_share": self._share(patches),
            "cosine_planted": float(cosine[self.hits].mean()),
            "cosine_other": float(cosine[~self.hits].mean()),
            "accuracy": float((classes == self.labels).float().mean()),
            "accuracy_twin": float((self.twin[2] == self.labels).float().mean()),
            "cls_drift": float(1 - F.cosine_similarity(summary, self.twin[1], dim=-1).mean()),
        }


def run_arm(
    arm: Arm, case: Case, ruler: Ruler, pixels: torch.Tensor, labels: torch.Tensor, seed: int
) -> dict[str, Any]:
    """One row; what says where it was run is the device that the arm was made on, not the machine's best one."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    model = arm.make(case, pixels, labels, seed)
    seconds = time.perf_counter() - started
    sizes = trainable_by_part(model) if arm.trained else {}
    numbers = {name: round(value, 5) for name, value in ruler.measure(model).items()}
    return {
        "arm": arm.name,
        "labels": arm.labels,
        "trained": arm.trained,
        "model": case.name,
        "seed": seed,
        **numbers,
        "parameters": sum(sizes.values()),
        "parts": sizes,
        "seconds": round(seconds, 1),
        "hardware": hardware_name(case.device),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is not in the report yet, write it and the table, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--arms", nargs="+", help="names, default all; see repair_arms.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", help="where arms are made; the models are planted on the CPU")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of 16 images")
    parser.add_argument("--images", type=int, default=256, help="held-out images that are measured")
    parser.add_argument("--test-seed", type=int, default=TEST_SEED, help="of the held-out images")
    parser.add_argument("--out", type=Path, default=Path("repair.json"))
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="take over these reports' rows, run nothing")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.arms or ()) - {arm.name for arm in ARMS})
    if unknown:
        parser.error(f"unknown arms {unknown}; there are {[arm.name for arm in ARMS]}")
    warnings.filterwarnings("ignore")
    config = {"steps": args.steps, "batch": 16, "images": args.images}
    if args.test_seed != TEST_SEED:
        config["test_seed"] = args.test_seed
    rows = {row_key(row): row for path in [args.out, *args.merge] for row in _rows(path, config)}
    order = [arm.name for arm in ARMS]
    kept = sorted(rows.values(), key=lambda row: (row["seed"], order.index(row["arm"])))
    report = {"benchmark": "repair", "config": config, **describe_machine(), "rows": kept}
    wanted = [arm for arm in ARMS if not args.arms or arm.name in args.arms]
    done = set(rows)
    if args.merge:
        wanted = []
        write_report(report, args.out)
    with tqdm(total=len(args.models) * len(wanted) * len(args.seeds), unit="arm") as bar:
        for seed in args.seeds if wanted else []:
            pixels, labels = pixels_of(args.steps * 16, TRAIN_SEED + seed)
            for name in args.models:
                case = replace(CASES[name](), device=args.device)
                ruler = Ruler(case, args.images, args.test_seed)
                for arm in wanted:
                    bar.set_postfix_str(f"{case.name}, {arm.name}, seed {seed}")
                    if (arm.name, case.name, seed) not in done:
                        row = run_arm(arm, case, ruler, pixels, labels, seed)
                        steps = arm.steps or args.steps
                        report["rows"].append({**row, "steps": steps if arm.trained else 0})
                        write_report(report, args.out)
                    bar.update()
    if args.table:
        write_table(report, args.table)
    return report


def _rows(path: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    rows = read_rows(path, config)
    if not rows:
        return []
    # Rows of older reports do not say where they were run; the report does.
    hardware = json.loads(path.read_text("utf-8"))["hardware"]
    machine = hardware.get("gpu") or hardware["cpu"]
    return [{"steps": config["steps"] if row["trained"] else 0, "hardware": machine, **row} for row in rows]


if __name__ == "__main__":
    rows = main()["rows"]
    sys.stdout.write(f"{len(rows)} rows\n")
