"""Loads an exported model of transformers, without this package. Run beside ``plain`` and ``expected.pt``."""

import torch
from absent import forbid

forbid("register_adapter")
from transformers import AutoModelForImageClassification  # noqa: E402

torch.set_num_threads(1)
model = AutoModelForImageClassification.from_pretrained("plain").eval()
expected = torch.load("expected.pt")
with torch.no_grad():
    assert torch.equal(model(expected["x"]).logits, expected["logits"])
