"""What evaluation costs beside the forward pass: features of patches, LOST and TokenCut.

Reading the features is compared with a plain forward pass, the two methods with the published procedures on the same
features.

    python benchmarks/evaluation.py --out benchmarks/results/evaluation-cpu.json

A DINOv2 of one of the shapes with random weights; the default size, 518 pixels, is a grid of 37 × 37 patches. What is
measured is time, which does not depend on what weights mean.

The published procedures are written from their papers (arXiv 2109.14279 and 2202.11539) and from what was seen of their
public code: LOST in torch with the whole matrix of similarities, its copy without the diagonal and its symmetric sum,
and all of the matrix summed over the chosen rows; TokenCut with SciPy's generalised eigenproblem.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from measuring import take_turns
from one_case import Case, build, compare, options, parse, write
from overhead import PATCH
from scipy.linalg import eigh
from scipy.ndimage import label
from torch.nn import functional as F

from register_adapter import find_tower, get_features
from register_adapter.evaluation.discovery import lost, tokencut
from register_adapter.evaluation.discovery.patches import PatchReader, Wanted

#: (a, b): time of a over time of b, and the most it may be.
LIMITS = {
    ("features", "forward"): 1.05,
    ("get_features", "forward"): 1.05,
    ("lost", "lost, published"): 1.0,
    ("tokencut", "tokencut, published"): 1.0,
}
#: Milliseconds that LOST may take for a grid of 37 × 37.
LOST_LIMIT = 5.0


def published_lost(features: torch.Tensor, grid: tuple[int, int], patches: int = 100) -> tuple[int, ...]:
    """The box in patches."""
    similarity = features @ features.T
    without = similarity.clone().fill_diagonal_(0)
    without[without < 0] = 0
    void(without + without.T)
    degree = -(without > 0).sum(1).float()
    order = degree.argsort(descending=True)
    seed, lowest = order[0], order[:patches]
    chosen = lowest[similarity[seed, lowest] > 0]
    return _box((similarity[chosen].sum(0) > 0).reshape(grid).numpy(), int(seed))


def published_tokencut(features: torch.Tensor, grid: tuple[int, int]) -> tuple[int, ...]:
    """The box in patches."""
    cosine = F.normalize(features, dim=1)
    weights = np.where((cosine @ cosine.T).numpy() > 0.2, 1.0, 1e-5)
    degrees = np.diag(weights.sum(1))
    vector = eigh(degrees - weights, degrees, subset_by_index=[1, 2])[1][:, 0]
    side, seed = vector > vector.mean(), int(np.abs(vector).argmax())
    return _box((side if side[seed] else ~side).reshape(grid), seed)


def _box(inside: Any, seed: int) -> tuple[int, ...]:
    labels = label(inside)[0]
    rows, columns = np.where(labels == labels[np.unravel_index(seed, inside.shape)])
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def make_calls(case: Case) -> dict[str, Callable[[], None]]:
    """The variants, by name."""
    model = build(case)
    images = torch.randn(case.batch, 3, case.size, case.size)
    grid = (case.size // PATCH, case.size // PATCH)
    tower = find_tower(model)
    wanted = Wanted("keys", -1)
    reader = PatchReader(model, [wanted])

    def forward() -> None:
        with torch.no_grad():
            tower.run(images.to(case.device, getattr(torch, case.dtype)))

    keys = reader.read(images, grid)[wanted][0].cpu()
    keys -= keys.mean(0)  # random weights make all patches alike, a graph that cannot be cut
    place: dict[str, Any] = {"grid": grid, "patch_size": PATCH}
    return {
        "forward": forward,
        "features": lambda: void(reader.read(images, grid)),
        "get_features": lambda: void(get_features(model, images, what=["patch", "cls"])),
        "lost": lambda: void(lost(keys, **place)),
        "lost, published": lambda: void(published_lost(keys, grid)),
        "tokencut": lambda: void(tokencut(keys, **place)),
        "tokencut, published": lambda: void(published_tokencut(keys, grid)),
    }


def void(value: Any) -> None:
    """Nothing, whatever was computed."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, write the report, and return it."""
    parser = options(__doc__, "evaluation", images=1, repeats=31)
    parser.set_defaults(size=518, batch=1)
    parser.add_argument("--slow_repeats", type=int, default=7, help="turns of TokenCut and of the forward pass")
    args = parse(parser, argv, "slow_repeats")
    started = time.time()
    case = Case.of(args)
    calls, kind = make_calls(case), torch.device(args.device).type
    results = []
    for pair in LIMITS:
        repeats = args.repeats if "lost" in pair else args.slow_repeats
        chosen = {name: calls[name] for name in pair}
        results.append(asdict(case) | take_turns(chosen, [pair], kind, repeats, 0.0, args.budget))
    measured = {key: value for result in results for key, value in result["ratios"].items()}
    targets = [
        compare(first, second, measured[f"{first}/{second}"]["median"], limit)
        for (first, second), limit in LIMITS.items()
    ]
    took = next(result["milliseconds"] for result in results if "lost" in result["milliseconds"])["lost"]["median"]
    targets.append({"target": "ms of lost", "value": took, "limit": LOST_LIMIT, "passed": took <= LOST_LIMIT})
    return write("evaluation", args, results, targets, started)


if __name__ == "__main__":
    for target in main()["targets"]:
        said = "reached" if target["passed"] else "missed"
        sys.stdout.write(f"{target['target']}: {target['value']:.3f}, at most {target['limit']:.3f}: {said}\n")
