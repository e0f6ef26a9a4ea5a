"""Loads an adapter of a shipped base with no base at hand, runs it, and saves it again.

Usage: ``python load_shipped_fit.py FOLDER``; FOLDER holds ``fitted`` and receives ``logits.pt`` and ``again``.
"""

import sys
from pathlib import Path

import torch
from peft import AutoPeftModel

import register_adapter  # noqa: F401 - registers the method with PEFT

folder = Path(sys.argv[1])
pixels = torch.rand(2, 3, 80, 80, generator=torch.Generator().manual_seed(0))
model = AutoPeftModel.from_pretrained(folder / "fitted").eval()
torch.save(model(pixels).logits.detach(), folder / "logits.pt")
model.save_pretrained(folder / "again")
