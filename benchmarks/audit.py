"""What an audit costs: its time over that of a plain forward pass over the same pictures, in turns.

    python benchmarks/audit.py --out benchmarks/results/audit-cpu.json

The pictures are ready batches, so that decoding files, which both need, does not hide what the audit adds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import describe_machine, take_turns
from overhead import PATCH, SHAPES
from transformers import Dinov2Config, Dinov2Model

from register_adapter.artifacts import audit

#: Most that an audit may cost, in units of a plain forward pass.
LIMITS = {"audit, no attentions": 1.25, "audit": 2.0}


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: str
    size: int
    batch: int
    images: int
    dtype: str
    device: str


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


def make_calls(case: Case) -> dict[str, Callable[[], None]]:
    """The variants, by name, over the same pictures."""
    model = build(case)
    pictures = torch.randn(case.images, 3, case.size, case.size, generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        with torch.no_grad():
            for batch in torch.split(pictures, case.batch):
                model(batch.to(case.device, getattr(torch, case.dtype)))

    def audited(attentions: bool) -> Callable[[], None]:
        def call() -> None:
            audit(model, pictures, attentions=attentions, batch_size=case.batch, progress=False)

        return call

    return {"forward": forward, "audit, no attentions": audited(False), "audit": audited(True)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="s")
    parser.add_argument("--size", type=int, default=224, help="image side, a multiple of 14")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=32, help="pictures of one call")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=float, default=900, help="most seconds of all turns")
    parser.add_argument("--out", type=Path, default=Path("audit.json"))
    args = parser.parse_args(argv)
    if args.size < PATCH or args.size % PATCH:
        parser.error(f"--size must be a multiple of {PATCH}, got {args.size}")
    if min(args.batch, args.images, args.repeats) < 1:
        parser.error("--batch, --images and --repeats must be at least 1")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, write the report, and return it."""
    args = parse(argv)
    started = time.time()
    case = Case(args.model, args.size, args.batch, args.images, args.dtype, args.device)
    ratios = [(name, "forward") for name in LIMITS]
    kind = torch.device(args.device).type
    result = asdict(case) | take_turns(make_calls(case), ratios, kind, args.repeats, 0.0, args.budget)
    targets = []
    for name, limit in LIMITS.items():
        value = result["ratios"][f"{name}/forward"]["median"]
        targets.append(
            {"target": f"time of {name} / forward", "value": value, "limit": limit, "passed": value <= limit}
        )
    report = {
        "benchmark": "audit",
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        **describe_machine(),
        "results": [result],
        "targets": targets,
        "seconds": round(time.time() - started, 1),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def summary(report: dict[str, Any]) -> str:
    """The targets as lines."""
    lines = []
    for target in report["targets"]:
        (ratio,) = (
            value
            for result in report["results"]
            for key, value in result["ratios"].items()
            if target["target"] == f"time of {key.replace('/', ' / ')}"
        )
        said = "reached" if target["passed"] else "missed"
        lines.append(
            f"{target['target']}: {ratio['median']:.3f} ({ratio['p10']:.3f}–{ratio['p90']:.3f}), "
            f"at most {target['limit']}: {said}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(summary(main()) + "\n")
