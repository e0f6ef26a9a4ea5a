"""What an audit costs: its time over that of a plain forward pass over the same images, in turns.

    python benchmarks/audit.py --out benchmarks/results/audit-cpu.json

The images are ready batches, so that decoding files, which both need, does not hide what the audit adds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from measuring import take_turns
from one_case import Case, build, compare, options, parse, write

from register_adapter import audit

#: Most that an audit may cost, in units of a plain forward pass.
LIMITS = {"audit, no attentions": 1.25, "audit": 2.0}


def make_calls(case: Case) -> dict[str, Callable[[], None]]:
    """The variants, by name, over the same images."""
    model = build(case)
    images = torch.randn(case.images, 3, case.size, case.size, generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        with torch.no_grad():
            for batch in torch.split(images, case.batch):
                model(batch.to(case.device, getattr(torch, case.dtype)))

    def audited(attentions: bool) -> Callable[[], None]:
        def call() -> None:
            audit(model, images, attentions=attentions, batch_size=case.batch, progress=False)

        return call

    return {"forward": forward, "audit, no attentions": audited(False), "audit": audited(True)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, write the report, and return it."""
    args = parse(options(__doc__, "audit", images=32, repeats=7), argv)
    started = time.time()
    case = Case.of(args)
    ratios = [(name, "forward") for name in LIMITS]
    kind = torch.device(args.device).type
    result = asdict(case) | take_turns(make_calls(case), ratios, kind, args.repeats, 0.0, args.budget)
    targets = [
        compare(name, "forward", result["ratios"][f"{name}/forward"]["median"], limit) for name, limit in LIMITS.items()
    ]
    return write("audit", args, [result], targets, started)


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
