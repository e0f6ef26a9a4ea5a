"""Whether grown outliers hold a summary of the image: what can be read off them, and what their exchange does.

    python benchmarks/grown_memory.py --grown FOLDER --out benchmarks/results/grown-memory.json --table docs/grown.md

``FOLDER`` has the runs of ``scripts/grow_testbed.py`` that say a summary; those without outliers are left out. Tokens
are read after a LayerNorm without weights, by ridge regression from one token an image, behind the block where outliers
tell most of the summary; ``mean`` stands for the image's mean contents, ``rest`` for what of the summary is no linear
function of it. An exchange holds the tokens of one kind, behind each block from the first with half of the outliers on,
at those of the next image, or at their mean over images; its control does it with as many other tokens. Exchanges are
for models whose asking tiles, all tiles, or a query say the summary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measuring import describe_machine
from safetensors.torch import load_file
from tables import cell, put_between, write_report
from torch import nn

from register_adapter import capture, find_tower
from register_adapter.testbed.grown import TILE_KINDS, Ensemble, GrownModel, Mosaics, MosaicTask, Recipe, read_grown
from register_adapter.testbed.grown.mosaics import summary_of
from register_adapter.testbed.grown.recipes import PooledModel
from register_adapter.towers.calls import first_of, with_first

#: Images that read-outs are fitted on and that all is measured on, and their seeds.
FIT, TEST = (1536, 70_001), (512, 70_002)
#: A token is an outlier over this multiple of the median norm; runs with a smaller share of them are left out.
FACTOR, LEAST = 3.0, 0.002
#: Penalty of the read-out, times the number of images.
RIDGE = 1e-3
_READ = ("mean", "summary", "rest")


def _tokens(model: GrownModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Patch tokens behind every block, ``(B, P, D)`` each, from the input of the first on."""
    parts = []
    for batch in torch.split(pixels, 128):
        with capture(model.backbone) as trace:
            model.backbone(pixel_values=batch)
        parts.append(trace.hidden_states)
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def _solved(inputs: torch.Tensor, wanted: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Ridge regression from ``(N, D)`` to ``(N, T)``."""
    centre, middle = inputs.mean(0), wanted.mean(0)
    centred = inputs - centre
    square = centred.T @ centred + RIDGE * len(inputs) * torch.eye(inputs.shape[1])
    weight = torch.linalg.solve(square, centred.T @ (wanted - middle))
    return lambda rows: (rows - centre) @ weight + middle


def _explained(said: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of the variance of all columns, R²."""
    return 1 - float((said - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def _picked(kind: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with a token of a kind ``(B, P)``, and a random one of these in each."""
    images = kind.any(1).nonzero()[:, 0]
    return images, (torch.rand(kind.shape, generator=rng) * kind)[images].argmax(1)


def _kinds(drawn: Mosaics, norms: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens by what they are read as ``(B, P)``, bool."""
    outliers = norms > FACTOR * norms.median()
    return {
        "outliers": outliers,
        "other background": drawn.is_background & ~outliers,
        "contents": (drawn.kinds == TILE_KINDS.index("contents")) & ~outliers,
        "asking": (drawn.kinds == TILE_KINDS.index("asking")) & ~outliers,
    }


def read_out(fitted: tuple[Any, ...], tested: tuple[Any, ...]) -> dict[str, dict[str, float | None]]:
    """R² on held-out images of what is read off one token of each kind; ``None`` for a kind that is rare.

    Args:
        fitted: Tokens ``(B, P, D)``, their kinds, and what is to be read, of the images that are fitted on.
        tested: The same of held-out images.
    """
    result: dict[str, dict[str, float | None]] = {}
    for kind in fitted[1]:
        parts = []
        for tokens, kinds, wanted in (fitted, tested):
            images, places = _picked(kinds[kind], torch.Generator().manual_seed(0))
            rows = nn.functional.layer_norm(tokens[images, places], tokens.shape[-1:])
            parts.append((rows, {name: values[images] for name, values in wanted.items()}))
        if min(len(rows) for rows, _ in parts) < 100:
            result[kind] = dict.fromkeys(_READ)
            continue
        (rows, known), (others, asked) = parts
        result[kind] = {name: round(_explained(_solved(rows, known[name])(others), asked[name]), 3) for name in _READ}
    return result


@contextmanager
def _held(model: GrownModel, first: int, kind: torch.Tensor, tokens: dict[int, torch.Tensor]) -> Iterator[None]:
    """Behind every block from ``first`` on, the places of a kind ``(B, P)`` have these tokens ``(B, P, D)``."""
    blocks = find_tower(model.backbone).part("blocks")

    def hold(layer: int) -> Callable[..., Any]:
        return lambda module, args, output: with_first(
            output, torch.where(kind[..., None], tokens[layer], first_of(output))
        )

    layers = range(first, len(blocks) + 1)
    handles = [blocks[layer - 1].register_forward_hook(hold(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _next(clean: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """At the places of a kind the tokens of the next image at its own, in turn; as they are if it has none."""
    tokens = clean.clone()
    for image, places in enumerate(kind):
        other = (image + 1) % len(clean)
        source = clean[other][kind[other]]
        if len(source) and places.any():
            tokens[image, places] = source[torch.arange(int(places.sum())) % len(source)]
    return tokens


def _mean(clean: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    return torch.where(kind[..., None], clean[kind].mean(0), clean)


def exchanged(model: GrownModel, task: MosaicTask, drawn: Mosaics, first: int) -> dict[str, dict[str, float]]:
    """Errors while tokens of a kind are exchanged behind every block from ``first`` on, and whose summary is said.

    Returns:
        For each exchange: ``summary``, the mean squared error where it is said, not counting exchanged tiles;
        ``fetched``, that at the tiles that ask; ``of_own``, R² of what is said on average with the summary of the own
        image, and ``of_other`` with that of the image that tokens came from.
    """
    clean = dict(enumerate(_tokens(model, drawn.pixel_values)))
    kinds, tiles = _kinds(drawn, clean[first].norm(dim=-1)), drawn.kinds.shape[1]
    outliers, asking = kinds["outliers"], drawn.kinds == TILE_KINDS.index("asking")
    ordinary = kinds["contents"] | kinds["other background"]
    # as many ordinary tokens as there are outliers, at random places
    draw = torch.rand(outliers.shape, generator=torch.Generator().manual_seed(1)) * ordinary
    control = (draw.argsort(1, descending=True).argsort(1) < outliers.sum(1, keepdim=True)) & ordinary
    says = asking if task.summary_at == "asking" else ~(outliers | control)
    summary = summary_of(task, drawn.targets[..., : task.contents])
    changes = {
        "nothing": (outliers, _plain),
        "outliers of the next image": (outliers, _next),
        "mean outlier": (outliers, _mean),
        "others of the next image": (control, _next),
        "mean of others": (control, _mean),
    }
    result = {}
    for name, (kind, change) in changes.items():
        with _held(model, first, kind, {layer: change(tokens, kind) for layer, tokens in clean.items()}):
            said = model(drawn.pixel_values)
        told = said[..., -task.summary :]
        told = told[:, :1] if task.summary_at == "pooled" else told[:, -tiles:]
        who = says[:, :1] | True if task.summary_at == "pooled" else says
        mean = (told * who[..., None]).sum(1) / who.sum(1, keepdim=True)
        fetched = slice(task.contents, 2 * task.contents)
        result[name] = {
            "summary": round(float((told - summary[:, None]).square()[who].mean()), 4),
            "fetched": round(float((said[:, -tiles:] - drawn.targets).square()[asking][:, fetched].mean()), 4),
            "of_own": round(_explained(mean, summary), 3),
            "of_other": round(_explained(mean, summary.roll(-1, 0)), 3),
        }
    return result


def _plain(clean: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    return clean


def _whole(folder: Path, recipe: Recipe, seeds: list[int], seed: int) -> GrownModel:
    """A model with the query that its folder leaves out, from the last checkpoint of its run."""
    ensemble = Ensemble(recipe, seeds)
    ensemble.load_state_dict(load_file(folder / "checkpoint" / "model.safetensors"))
    return ensemble.models()[seeds.index(seed)]


@torch.no_grad()
def measured(folder: Path, run: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """A row, or ``None`` for a model without outliers."""
    task = MosaicTask.from_dict(run["recipe"]["task"])
    shares = run["curves"][-1]["seeds"][run["seeds"].index(seed)]["outliers"]
    if max(shares) < LEAST:
        return None
    recipe = Recipe(**{**run["recipe"], "task": task})
    pooled = task.summary_at == "pooled"
    model = _whole(folder, recipe, run["seeds"], seed) if pooled else read_grown(folder / f"seed-{seed}")
    layers = [layer for layer, share in enumerate(shares) if share >= max(shares) / 2]
    drawn, wanted, tokens = [], [], []
    for count, number in (FIT, TEST):
        drawn.append(task.draw(count, number))
        contents = drawn[-1].targets[..., : task.contents]
        wanted.append({"mean": contents.mean(1), "summary": summary_of(task, contents)})
        tokens.append(_tokens(model, drawn[-1].pixel_values))
    linear = _solved(wanted[0]["mean"], wanted[0]["summary"])
    for values in wanted:
        values["rest"] = values["summary"] - linear(values["mean"])
    reads = {}
    for layer in layers:
        here = [hidden[layer] for hidden in tokens]
        kinds = [_kinds(images, hidden.norm(dim=-1)) for images, hidden in zip(drawn, here, strict=True)]
        reads[layer] = read_out(*zip(here, kinds, wanted, strict=True))
    best = max(reads, key=lambda layer: reads[layer]["outliers"]["summary"] or -1.0)
    row: dict[str, Any] = {"arm": folder.name, "model": "tiles" if task.grid == 7 else "mosaics", "seed": seed}
    row |= {"outlier_share": round(max(shares), 4), "read_behind": best, "read": reads[best]}
    if task.summary_at in ("asking", "every", "pooled"):
        row |= {"exchanged_behind": layers[0], "exchanged": exchanged(model, task, drawn[1], layers[0])}
    if isinstance(model, PooledModel):
        given = model.weights(model.backbone(pixel_values=drawn[1].pixel_values).last_hidden_state)
        last = _kinds(drawn[1], tokens[1][layers[-1]].norm(dim=-1))["outliers"]
        row["pooled_from_outliers"] = round(float((given * last).sum(1).mean()), 4)
    return row


def make_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Two tables in Markdown: what is read, and what exchanges do."""
    runs = list(dict.fromkeys(row["arm"] for row in rows))
    lines = [
        "| run | tokens | mean contents, R² | summary, R² | its non-linear rest, R² | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        own = [row for row in rows if row["arm"] == run]
        for kind in own[0]["read"]:
            read = [row["read"][kind] for row in own if row["read"][kind]["mean"] is not None]
            if read:
                cells = [cell([values[name] for values in read], 2) for name in _READ]
                lines.append(f"| `{run}` | {kind} | {' | '.join(cells)} | {len(read)} |")
    lines += [
        "",
        "| run | put in | summary, error | fetched, error | R² with the own summary | with the other image's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        own = [row["exchanged"] for row in rows if row["arm"] == run and "exchanged" in row]
        for name in own[0] if own else ():
            cells = [
                cell([row[name][figure] for row in own], digits)
                for figure, digits in (("summary", 3), ("fetched", 3), ("of_own", 2), ("of_other", 2))
            ]
            lines.append(f"| `{run}` | {name} | {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Measure every run with a summary, and write report and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grown", type=Path, required=True, help="folder that scripts/grow_testbed.py wrote")
    parser.add_argument("--out", type=Path, default=Path("grown-memory.json"))
    parser.add_argument("--table", type=Path, help="Markdown file to write the tables into")
    args = parser.parse_args(argv)
    rows = []
    for path in sorted(args.grown.glob("*/curves.json")):
        run = json.loads(path.read_text("utf-8"))
        if run["recipe"]["task"]["summary"]:
            rows += [row for seed in run["seeds"] if (row := measured(path.parent, run, seed)) is not None]
    write_report({"benchmark": "grown-memory", **describe_machine(), "rows": rows}, args.out)
    if args.table is not None:
        put_between(args.table, "grown-memory", make_tables(rows))


if __name__ == "__main__":
    main()
