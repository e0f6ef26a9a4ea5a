"""What benchmarks of one model at one size share: the case, the options, and the report."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import describe_machine
from overhead import PATCH, SHAPES
from transformers import Dinov2Config, Dinov2Model

__all__ = ["Case", "build", "compare", "options", "parse", "write"]


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: str
    size: int
    batch: int
    images: int
    dtype: str
    device: str

    @classmethod
    def of(cls, args: argparse.Namespace) -> Case:
        """The case that the options ask for."""
        return cls(args.model, args.size, args.batch, args.images, args.dtype, args.device)


def build(case: Case) -> Any:
    """A DINOv2 of one of the shapes, with random weights and the default attention (SDPA)."""
    width, blocks, heads = SHAPES[case.model]
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        image_size=case.size,
        patch_size=PATCH,
    )
    return Dinov2Model(config).eval().to(case.device, getattr(torch, case.dtype))


def options(description: str | None, name: str, images: int, repeats: int) -> argparse.ArgumentParser:
    """The options that all have, with defaults of their own for some."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="s")
    parser.add_argument("--size", type=int, default=224, help="image side, a multiple of 14")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=images, help="images of one call")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--budget", type=float, default=900, help="most seconds of all turns")
    parser.add_argument("--out", type=Path, default=Path(f"{name}.json"))
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, *counts: str) -> argparse.Namespace:
    """The options given; sizes, and numbers by the names of ``counts``, are checked."""
    args = parser.parse_args(argv)
    if args.size < PATCH or args.size % PATCH:
        parser.error(f"--size must be a multiple of {PATCH}, got {args.size}")
    for count in ("batch", "images", "repeats", *counts):
        if getattr(args, count) < 1:
            parser.error(f"--{count} must be at least 1, got {getattr(args, count)}")
    return args


def compare(first: str, second: str, value: float, limit: float) -> dict[str, Any]:
    """What a ratio of times was to be, and is."""
    passed = bool(value <= limit)
    return {"target": f"time of {first} / {second}", "value": value, "limit": round(limit, 4), "passed": passed}


def write(
    name: str, args: argparse.Namespace, results: list[dict[str, Any]], targets: list[dict[str, Any]], started: float
) -> dict[str, Any]:
    """Write the report, and return it."""
    report = {
        "benchmark": name,
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        **describe_machine(),
        "results": results,
        "targets": targets,
        "seconds": round(time.time() - started, 1),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return report
