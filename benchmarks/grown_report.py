"""Table and images of models whose artifacts grew by themselves, for docs/grown.md and the README.

    python benchmarks/grown_report.py --docs docs

``grown_curves.png``: the largest patch norm over the median while models grow, every seed a line, from
``benchmarks/results/grown.json``, from which the table is too. ``grown.png``: what the packaged model does on held-out
images, without registers, with one fitted register, and what its twin does that had registers from the start.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from tables import put_between

from register_adapter import capture, fit_test_time_registers
from register_adapter.testbed import load_grown
from register_adapter.testbed.grown import RECIPES

RESULTS = Path(__file__).parent / "results" / "grown.json"
#: Which norms and which attention are drawn.
LAYER, BLOCK = 3, 3
#: Kind of a run to its colour and what it is called.
_KINDS = {
    "": ("#b2182b", "as they are"),
    "-wide": ("#ef8a62", "MLP of 256"),
    "-registers": ("#2166ac", "4 registers from the start"),
    "-cls": ("#67a9cf", "CLS from the start"),
}


def draw_curves(path: Path) -> None:
    """Largest norm over the median of any layer, by step."""
    runs = {run["name"]: run for run in json.loads(RESULTS.read_text())["runs"]}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, recipe in zip(axes, ("mosaics", "tiles"), strict=True):
        for suffix, (colour, label) in _KINDS.items():
            curves = runs[recipe + suffix]["curves"]
            for number in range(len(runs[recipe + suffix]["seeds"])):
                ratios = [max(entry["seeds"][number]["ratio"]) for entry in curves]
                steps = [entry["step"] for entry in curves]
                axis.plot(steps, ratios, color=colour, lw=1, label=None if number else label)
        axis.axhline(3, color="0.6", lw=0.8, ls=":")
        axis.set(title=f"{recipe}, 5 seeds each", xlabel="optimiser step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("largest patch norm / median")
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def _look(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch norms over their median and the attention that patches receive, ``(B, h, w)`` each."""
    with capture(model) as trace:
        model(pixel_values=pixels)
    norms = trace.patches(LAYER).norm(dim=-1)
    side = int(norms.shape[1] ** 0.5)
    received = trace.attentions[BLOCK].mean((1, 2))[:, -norms.shape[1] :]
    return (norms / norms.median()).reshape(-1, side, side), received.reshape(-1, side, side)


def draw_models(path: Path, count: int = 3) -> None:
    """Rows are images; columns are norms and attention of the model, the repaired model, and the twin."""
    task = RECIPES["mosaics"].task
    drawn = task.draw(count, seed=77)
    base = load_grown("mosaics").backbone
    fitted = fit_test_time_registers(
        load_grown("mosaics").backbone, list(torch.split(task.draw(128, seed=78).pixel_values, 32)), progress=False
    )
    models = {"grown": base, "+ 1 fitted register": fitted, "twin, registers from the start": None}
    models["twin, registers from the start"] = load_grown("mosaics", "registers").backbone
    looks = {name: _look(model, drawn.pixel_values) for name, model in models.items()}
    figure, axes = plt.subplots(count, 1 + 2 * len(models), figsize=(13, 1.95 * count + 0.5), layout="constrained")
    for row in range(count):
        axes[row, 0].imshow(drawn.images[row].permute(1, 2, 0))
        for number, (name, (norms, received)) in enumerate(looks.items()):
            left, right = axes[row, 1 + 2 * number], axes[row, 2 + 2 * number]
            shown = left.imshow(norms[row], vmin=0, vmax=6, cmap="viridis")
            seen = right.imshow(received[row] * 100, vmin=0, vmax=20, cmap="magma")
            if not row:
                left.set_title(f"{name}\nnorms", fontsize=9)
                right.set_title("\nattention", fontsize=9)
    axes[0, 0].set_title("image", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    for image, part, label in ((shown, axes[:, :4], "norm / median"), (seen, axes[:, 4:], "% of all attention")):
        figure.colorbar(image, ax=list(part.flat), location="bottom", fraction=0.03, shrink=0.7, label=label)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def make_table() -> list[str]:
    """A line a run in Markdown: ranges over the seeds of its last checkpoint."""

    def between(values: list[float], digits: int, factor: float = 1.0) -> str:
        low, high = (f"{factor * value:.{digits}f}" for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    lines = [
        "| run | parameters | on a | seeds | steps | held-out loss | largest / median | outliers, % | attention, % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in json.loads(RESULTS.read_text())["runs"]:
        last = run["curves"][-1]
        measured = last["seeds"]
        cells = [
            f"`{run['name']}`",
            f"{run['parameters']:,}",
            "GPU" if "NVIDIA" in run["device"] else "CPU",
            str(len(measured)),
            f"{last['step']:,}",
            between([entry["loss"] for entry in measured], 4),
            between([max(entry["ratio"]) for entry in measured], 1),
            between([max(entry["outliers"]) for entry in measured], 1, 100),
            between([max(entry["attention"]) for entry in measured], 0, 100),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Write the table between its two comments, and draw both images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args(argv)
    put_between(args.docs / "grown.md", "grown", make_table())
    draw_curves(args.docs / "images" / "grown_curves.png")
    draw_models(args.docs / "images" / "grown.png")


if __name__ == "__main__":
    main()
