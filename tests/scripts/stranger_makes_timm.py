"""Makes exported models with timm, without this package, and says of each whether it computes the same.

Usage: ``python stranger_makes_timm.py folder|file MODEL...``, folders with ``plain`` and ``expected.pt``; prints JSON.
"""

import json
import sys
from pathlib import Path

import timm
import torch
from absent import forbid

forbid("register_adapter")
torch.set_num_threads(1)
way, *folders = sys.argv[1:]
same = {}
for folder in map(Path, folders):
    if way == "folder":
        model = timm.create_model(f"local-dir:{folder / 'plain'}", pretrained=True)
    else:
        config = json.loads((folder / "plain" / "config.json").read_text())
        file = str(folder / "plain" / "model.safetensors")
        model = timm.create_model(config["architecture"], checkpoint_path=file, **config["model_args"])
    model = model.eval().requires_grad_(False)
    expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        same[folder.name] = torch.equal(model(expected["x"]), expected["logits"])
sys.stdout.write(json.dumps(same))
