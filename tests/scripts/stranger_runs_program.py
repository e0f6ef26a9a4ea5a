"""Runs an exported program without this package and without transformers. Run beside the program and its outputs."""

import sys

import torch
from absent import forbid

forbid("register_adapter")
torch.set_num_threads(1)
program = torch.export.load("model.pt2").module()
expected = torch.load("expected.pt")
assert "transformers" not in sys.modules
assert (program(pixel_values=expected["x"])["logits"] - expected["logits"]).abs().max() <= 1e-5
