"""Plant artifacts into the shipped ViT and write the planted units beside its weights.

python scripts/plant_testbed.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from register_adapter.artifacts import patch_norms, summarise_norms
from register_adapter.testbed import SceneDataset, load_vit, plant_artifacts, random_registers
from register_adapter.testbed.vit import WEIGHTS, save_planting


def images(count: int, seed: int, split: str) -> torch.Tensor:
    """``(count, 3, 80, 80)`` scenes, scaled to -1…1."""
    scenes = SceneDataset(count, seed=seed, split=split)
    stacked = torch.stack([torch.from_numpy(scenes.scene(index).image) for index in range(count)])
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    parser.add_argument("--block", type=int, default=None)
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--strength", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # Half the images have gradients alone behind the shapes: the share shall hold for both kinds.
    fit = torch.cat([images(128, args.seed, "train"), images(64, args.seed + 1, None)])
    planting = plant_artifacts(
        load_vit(args.folder), args.block, fit, strength=args.strength, share=args.share, seed=args.seed
    )
    save_planting(planting, args.folder)

    held_out = images(256, 10_001, "test").split(64)
    before = summarise_norms(patch_norms(planting.model, held_out))
    kept = []
    for seed in range(5):
        with random_registers(planting.model, 4, 0.02, seed) as probed:
            kept.append(summarise_norms(patch_norms(probed, held_out)).share / before.share)
    record = {
        "block": planting.block,
        "neurons": planting.neurons,
        "arguments": {key: value for key, value in vars(args).items() if key != "folder"},
        "held_out_share": before.share,
        "held_out_largest_over_median": before.largest,
        "share_kept_by_4_random_registers": kept,
    }
    (args.folder / "planted.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
