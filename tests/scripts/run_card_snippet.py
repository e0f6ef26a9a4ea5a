"""Runs the Python snippet of a model card as a reader would, and prints its model's logits on fixed pixels as JSON.

Usage: ``python run_card_snippet.py README``, in the folder that the snippet's paths are relative to.
"""

import json
import re
import sys
from pathlib import Path

import torch

(snippet,) = re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL)
names: dict[str, object] = {}
exec(compile(snippet, sys.argv[1], "exec"), names)
model = names["model"]
assert isinstance(model, torch.nn.Module)
pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
print(json.dumps(model(pixel_values=pixels).logits.tolist()))
