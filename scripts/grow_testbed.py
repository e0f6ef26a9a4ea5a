"""Grow small vision transformers whose high-norm patch tokens emerge by themselves.

    python scripts/grow_testbed.py mosaics --seeds 0 1 2 3 4 --output_dir grown
    python scripts/grow_testbed.py mosaics --twin registers --seeds 0 1 2 3 4 --output_dir grown

Writes ``grown/mosaics/`` (or ``grown/mosaics-registers/``): ``curves.json`` with the recipe, versions, hardware and,
for every seed, what :func:`register_adapter.testbed.grown.measure` says on the way; ``seed-0/`` and so on: the backbone
as a Hugging Face model with its image processor, registers that it had from the start as an adapter, and
``head.safetensors``. A run that was stopped goes on from its last checkpoint. ``--set width=128 blocks=8`` changes a
recipe, ``--set task.padding=2`` its task, ``--set objective=mae`` what is learned of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from ast import literal_eval
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from register_adapter.testbed.grown import (
    RECIPES,
    TWINS,
    Drawn,
    Ensemble,
    Recipe,
    measure,
    objective_of,
    save_grown,
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--twin", choices=list(TWINS), help="change one thing")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change the recipe")
    parser.add_argument("--name", help="folder in --output_dir; by default the recipe's name and the twin's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", type=Path, default=Path("grown"))
    parser.add_argument("--measure_every", type=int, default=100)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def changed(recipe: Recipe, changes: list[str]) -> Recipe:
    """The recipe with ``name=value`` pairs put in."""
    for change in changes:
        name, _, text = change.partition("=")
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if name.startswith("task."):
            recipe = replace(recipe, task=replace(recipe.task, **{name.removeprefix("task."): value}))
        else:
            recipe = replace(recipe, **{name: value})
    return recipe


def main() -> None:
    args = parse()
    recipe = changed(replace(RECIPES[args.recipe], **TWINS.get(args.twin, {})), args.set)
    folder = args.output_dir / (args.name or "-".join(filter(None, (args.recipe, args.twin))))
    accelerator = accelerate.Accelerator(cpu=args.cpu)
    ensemble = Ensemble(recipe, args.seeds)
    optimizer = torch.optim.AdamW(ensemble.groups(), lr=recipe.learning_rate, betas=(0.9, 0.95), foreach=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    model, optimizer, scheduler = accelerator.prepare(ensemble, optimizer, scheduler)
    objective = objective_of(model)
    if objective.state_dict():
        accelerator.register_for_checkpointing(objective)
    curves: list[dict[str, Any]] = []
    state = folder / "checkpoint"
    if (state / "curves.json").is_file():
        curves = json.loads((state / "curves.json").read_text())
        accelerator.load_state(str(state))
    start = curves[-1]["step"] if curves else 0
    steps = range(start, recipe.steps)
    loader = DataLoader(Subset(Drawn(recipe, args.seeds), steps), batch_size=None, num_workers=args.num_workers)
    began = time.perf_counter()
    for step, batch in enumerate(tqdm(loader, args.name or folder.name, mininterval=5), start + 1):
        batch = send_to_device(batch, accelerator.device)
        each = objective(model, batch)
        accelerator.backward(each.sum())
        optimizer.step()
        objective.follow(model)
        scheduler.step()
        optimizer.zero_grad()
        saves = step % args.checkpointing_steps == 0
        if step % args.measure_every == 0 or saves or step == recipe.steps:
            count = 128 if step < recipe.steps else 512
            measured = [measure(grown, recipe.task, count, held_out=objective.held_out) for grown in ensemble.models()]
            curves.append({"step": step, "train": each.tolist(), "seeds": measured})
        if saves:
            accelerator.save_state(str(state))
            (state / "curves.json").write_text(json.dumps(curves))
        if saves or step == recipe.steps:
            write(folder, ensemble, curves, time.perf_counter() - began)
    for seed, last in zip(args.seeds, curves[-1]["seeds"], strict=True):
        outliers = [round(100 * share, 2) for share in last["outliers"]]
        print(
            f"{folder.name} seed {seed}: loss {last['loss']:.5f}, largest / median norm {last['ratio']}, "
            f"outliers {outliers} %, attention {last['attention']}"
        )


def write(folder: Path, ensemble: Ensemble, curves: list[dict[str, Any]], seconds: float) -> None:
    """Models and curves as they are now."""
    for seed, grown in zip(ensemble.seeds, ensemble.models(), strict=True):
        save_grown(grown.cpu(), ensemble.recipe.task, folder / f"seed-{seed}")
    on_gpu = ensemble.stacked[0].is_cuda
    result = {
        "recipe": asdict(ensemble.recipe),
        "seeds": list(ensemble.seeds),
        "parameters": sum(value[0].numel() for value in ensemble.stacked),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "curves": curves,
    }
    (folder / "curves.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
