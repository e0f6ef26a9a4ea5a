"""Loads registers and LoRA saved together into a base, and compares logits bit for bit.

Usage: ``python load_pairs.py FOLDER ORDER...``; FOLDER holds ``base`` and, for every order, a folder and ``ORDER.pt``.
"""

import sys
from pathlib import Path

import torch
import transformers

from register_adapter import load_adapters

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for order in sys.argv[2:]:
    base = transformers.ViTForImageClassification.from_pretrained(folder / "base")
    saved = torch.load(folder / f"{order}.pt")
    with torch.no_grad():
        logits = load_adapters(base, str(folder / order))(**saved["inputs"]).logits
    assert torch.equal(logits, saved["outputs"]["logits"]), order
print("identical")
