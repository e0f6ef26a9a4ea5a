"""Loads saved adapters by the routes asked for, compares outputs bit for bit, and prints a report.

Usage: ``python load_by_every_route.py FOLDER``; every subfolder holds ``base``, ``adapter`` and ``expected.pt``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import AutoPeftModel, PeftModel

import register_adapter  # noqa: F401 - registers the method with PEFT

sys.path.append(str(Path(__file__).parents[1]))
from helpers import run

torch.set_num_threads(1)


def _through_transformers(kind: Any, base: str, adapter: str) -> Any:
    model = kind.from_pretrained(base)
    model.load_adapter(adapter)
    return model


ROUTES: dict[str, Any] = {
    "PeftModel": lambda kind, base, adapter: PeftModel.from_pretrained(kind.from_pretrained(base), adapter),
    "PeftModel, low memory": lambda kind, base, adapter: PeftModel.from_pretrained(
        kind.from_pretrained(base), adapter, low_cpu_mem_usage=True
    ),
    "PeftModel, trainable": lambda kind, base, adapter: PeftModel.from_pretrained(
        kind.from_pretrained(base), adapter, is_trainable=True
    ),
    "AutoPeftModel": lambda kind, base, adapter: AutoPeftModel.from_pretrained(adapter),
    "from_pretrained(adapter)": lambda kind, base, adapter: kind.from_pretrained(adapter),
    "load_adapter": _through_transformers,
}


def check(folder: Path) -> dict[str, str]:
    saved = torch.load(folder / "expected.pt")
    kind = getattr(tf, saved["class"])
    report = {}
    for route in saved["routes"]:
        try:
            outputs = run(ROUTES[route](kind, str(folder / "base"), str(folder / "adapter")).eval(), saved["inputs"])
            expected = saved["outputs"]
            same = list(outputs) == list(expected) and all(torch.equal(outputs[key], expected[key]) for key in expected)
            report[route] = "identical" if same else "different"
        except Exception as error:
            report[route] = f"{type(error).__name__}: {error}"
    return report


if __name__ == "__main__":
    folders = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
    sys.stdout.write(json.dumps({folder.name: check(folder) for folder in folders}) + "\n")
