"""What PyTorch's own kernels take for a few tokens more: attention and a linear layer at other lengths of a sequence.

A model with registers has a longer sequence; where its kernels take longer by more than the tokens that came
in, nothing but another length helps. See README.md beside this file.

    python benchmarks/lengths.py --out benchmarks/results/lengths-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import describe_machine, take_turns
from torch.nn import functional as F

#: Widths and heads of ViT-S, B and L.
MODELS = {"s": (384, 6), "b": (768, 12), "l": (1024, 16)}
#: A CLS token and the 16 x 16 patches of 224 pixels; from there on with registers.
BASE = 257


@torch.no_grad()
def kernels(width: int, heads: int, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Attention and the first linear layer of an MLP for one image."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    states = draw(1, tokens, heads, width // heads).transpose(1, 2)
    hidden, weight, bias = draw(1, tokens, width), draw(4 * width, width), draw(4 * width)
    return {
        "attention": partial(F.scaled_dot_product_attention, states, states, states),
        "linear": partial(F.linear, hidden, weight, bias),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, write the report, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="s,b,l", help="out of s, b, l")
    parser.add_argument("--registers", default="1,2,3,4,8,15", help="tokens beside the 257 of the base")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--min-time", type=float, default=0.005, help="least seconds of one timing")
    parser.add_argument("--budget", type=float, default=300.0, help="most seconds of one case")
    parser.add_argument("--out", type=Path, default=Path("lengths.json"))
    args = parser.parse_args(argv)
    lengths = [BASE, *(BASE + int(number) for number in args.registers.split(","))]
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report: dict[str, Any] = {"benchmark": "lengths", "config": config, **describe_machine(), "results": []}
    for model in args.models.split(","):
        for dtype in (torch.float32, torch.bfloat16):
            counts = {length: kernels(*MODELS[model], length, dtype) for length in lengths}
            for name in counts[BASE]:
                calls = {str(length): counts[length][name] for length in lengths}
                pairs = [(str(length), str(BASE)) for length in lengths[1:]]
                with torch.no_grad():
                    taken = take_turns(calls, pairs, "cpu", args.repeats, args.min_time, args.budget)
                case = {"kernel": name, "model": model, "dtype": str(dtype).removeprefix("torch.")}
                report["results"].append({**case, **taken})
                medians = {pair: ratio["median"] for pair, ratio in taken["ratios"].items()}
                sys.stderr.write(f"{case}: {medians}\n")
    report["load_average"] = os.getloadavg()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
