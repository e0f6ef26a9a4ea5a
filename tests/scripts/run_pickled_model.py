"""Runs a pickled model on the inputs pickled with it.

Usage: ``python run_pickled_model.py FOLDER``; FOLDER holds ``model.pt`` and receives ``hidden.pt``.
"""

import sys
from pathlib import Path

import torch

folder = Path(sys.argv[1])
model, inputs = torch.load(folder / "model.pt", weights_only=False)
with torch.no_grad():
    torch.save(model(**inputs).last_hidden_state, folder / "hidden.pt")
