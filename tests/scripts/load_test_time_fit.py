"""Loads a test-time register in two ways; its record and its logits are those of the process that saved it.

Usage: ``python load_test_time_fit.py FOLDER``; FOLDER holds ``base``, ``fitted``, ``expected.pt`` and ``fit.pt``.
"""

import sys
from pathlib import Path

import torch
from peft import AutoPeftModel, PeftModel
from transformers import ViTForImageClassification

import register_adapter  # noqa: F401 - registers the method with PEFT

torch.set_num_threads(1)
folder = Path(sys.argv[1])
expected, fit = torch.load(folder / "expected.pt"), torch.load(folder / "fit.pt")
base = ViTForImageClassification.from_pretrained(folder / "base")
fitted = str(folder / "fitted")
for model in (AutoPeftModel.from_pretrained(fitted), PeftModel.from_pretrained(base, fitted)):
    record = model.eval().peft_config["default"].test_time_fit
    assert record == fit
    assert record["curve"][str(record["num_neurons"])] == 0
    assert record["thresholds"]
    assert torch.equal(model(pixel_values=expected["pixels"]).logits, expected["logits"])
