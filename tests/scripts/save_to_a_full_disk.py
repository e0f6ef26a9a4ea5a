"""Saves over an adapter with a limit on a file's size, which makes a write fail in the middle as a full disk does.

Usage: ``python save_to_a_full_disk.py FOLDER LIMIT...``; prints a report in JSON.
"""

import json
import resource
import signal
import sys
from pathlib import Path

import torch
import transformers as tf

from register_adapter import add_registers, find_register_layer

folder = Path(sys.argv[1])
adapter = folder / "adapter"
shape = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 16}


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in adapter.iterdir()}


model = add_registers(tf.ViTModel(tf.ViTConfig(hidden_size=256, **shape)), 16)
model.save_pretrained(adapter)
before = files()
with torch.no_grad():
    find_register_layer(model).tokens("default").weight.add_(1.0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
reports = {}
for limit in sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    error = None
    try:
        model.save_pretrained(adapter)
    except OSError as caught:
        error = str(caught)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    left = [path.name for path in folder.iterdir()]
    reports[limit] = {"error": error, "same": files() == before, "left": left}
model.save_pretrained(adapter)
size, replaced = len(before["adapter_model.safetensors"]), files() != before
print(json.dumps({"reports": reports, "size": size, "replaced": replaced}))
