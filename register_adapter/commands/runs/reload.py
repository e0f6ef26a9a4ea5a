"""Load a saved adapter as a stranger would, in a process of its own.

    python -m register_adapter.commands.runs.reload ADAPTER_FOLDER PIXELS.safetensors OUTPUT.safetensors

reads ``pixel_values`` and writes the model's ``logits``, so that a caller can compare them with its own, bit for bit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import AutoPeftModel
from safetensors.torch import load_file, save_file

__all__ = ["logits_in_fresh_process", "main"]


def logits_in_fresh_process(adapter: str | Path, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits of a saved adapter on its saved base, computed by another Python process.

    Args:
        adapter: Folder of the adapter; its config names the base.
        pixel_values: ``(B, 3, H, W)`` float32 on the CPU.

    Raises:
        RuntimeError: The process failed; its last words are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        pixels, output = Path(folder, "pixels.safetensors"), Path(folder, "logits.safetensors")
        save_file({"pixel_values": pixel_values.contiguous()}, pixels)
        command = [sys.executable, "-m", __name__, str(adapter), str(pixels), str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"loading {adapter} in a fresh process failed:\n{done.stderr[-2000:]}")
        logits: torch.Tensor = load_file(output)["logits"]
        return logits


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("adapter", "pixels", "output"):
        parser.add_argument(name)
    args = parser.parse_args()
    import register_adapter  # noqa: F401 - makes the method known to PEFT

    model = AutoPeftModel.from_pretrained(args.adapter).eval()
    with torch.no_grad():
        logits = model(pixel_values=load_file(args.pixels)["pixel_values"]).logits
    save_file({"logits": logits.contiguous()}, args.output)


if __name__ == "__main__":
    main()
