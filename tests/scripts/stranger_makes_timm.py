"""Makes an exported model with timm, without this package, from its folder or its file.

Usage: ``python stranger_makes_timm.py folder|file``, beside ``plain`` and ``expected.pt``.
"""

import json
import sys
from pathlib import Path

import timm
import torch
from absent import forbid

forbid("register_adapter")
torch.set_num_threads(1)
if sys.argv[1] == "folder":
    model = timm.create_model("local-dir:plain", pretrained=True)
else:
    config = json.loads(Path("plain/config.json").read_text())
    model = timm.create_model(config["architecture"], checkpoint_path="plain/model.safetensors", **config["model_args"])
model = model.eval().requires_grad_(False)
expected = torch.load("expected.pt")
with torch.no_grad():
    assert torch.equal(model(expected["x"]), expected["logits"])
