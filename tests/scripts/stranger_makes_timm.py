"""Makes exported models with timm, without this package, and says of each whether it computes the same.

Usage: ``python stranger_makes_timm.py folder,file MODEL...``, folders with ``plain`` and ``expected.pt``; prints JSON.
"""

import json
import sys
from pathlib import Path

import timm
import torch
from absent import forbid

forbid("register_adapter")
torch.set_num_threads(1)


def make(way: str, folder: Path) -> torch.nn.Module:
    if way == "folder":
        return timm.create_model(f"local-dir:{folder / 'plain'}", pretrained=True)
    config = json.loads((folder / "plain" / "config.json").read_text())
    file = str(folder / "plain" / "model.safetensors")
    return timm.create_model(config["architecture"], checkpoint_path=file, **config["model_args"])


def is_same(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    with torch.no_grad():
        return torch.equal(model.eval().requires_grad_(False)(expected["x"]), expected["logits"])


ways, *folders = sys.argv[1:]
same = {
    way: {name: is_same(make(way, Path(name)), torch.load(Path(name) / "expected.pt")) for name in folders}
    for way in ways.split(",")
}
sys.stdout.write(json.dumps(same))
