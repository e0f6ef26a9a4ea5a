"""The audit's verdict on models whose truth is known, and how far the limits of the attention's evidence may move.

    python benchmarks/verdicts.py --grown grown --since later --out benchmarks/results/verdicts.json --docs docs
    python benchmarks/verdicts.py --only packaged planted      # what needs nothing that is not packaged

``--grown`` is a folder of ``scripts/grow_testbed.py``, with a folder for each run; what is not there is left out. Truth
of grown models: the last line of their curves (``results/grown.json``), by norms and attention of other images. Every
other model of each kind, as they are listed, is one that limits are chosen on; the rest says how good they are. Models
of ``--since`` grew after the limits were set, on tasks of their own, and are counted apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftModel
from repair_models import CASES, pixels_of

from register_adapter import RegisterAdapterError, audit, fit_test_time_registers
from register_adapter.artifacts.report import FAR_ABOVE, FAR_BELOW, MOST
from register_adapter.errors import NoArtifactsError, UnsupportedModelError
from register_adapter.testbed import load_grown, load_vit, plant_artifacts
from register_adapter.testbed.grown import RECIPES, MosaicTask
from register_adapter.testbed.grown.packaged import read_grown
from register_adapter.utils.environment import git_commit, machine, versions

CURVES = Path(__file__).parent / "results" / "grown.json"
_BEGIN, _END = "<!-- verdicts: made by benchmarks/verdicts.py -->", "<!-- /verdicts -->"
#: Kind of the models that grew after the limits were set.
SINCE = "grown since"
#: Pictures, and the seed of those that are drawn; no model grew on it.
IMAGES, SEED = 96, 4242
#: Share of patches over 3 times the median, and their share of the attention, at least, of a model that has artifacts.
OUTLIERS, ATTENTION = 0.005, 0.25
#: Limits that are tried: least attention, and how far values are below the others' (or one over it above).
ATTENTIONS, FACTORS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
#: Random models: a name in transformers, and what its configuration needs.
_SHAPE = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 80, "patch_size": 8}
_MLP = {"intermediate_size": 128}
RANDOM: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("ViT", "DeiT", "CLIPVision", "SiglipVision", "Beit", "IJepa", "ViTMSN"), _MLP),
    **{name: {"mlp_ratio": 2} for name in ("Dinov2", "Dinov2WithRegisters")},
}


@dataclass(frozen=True)
class Subject:
    """A model whose truth is known.

    Attributes:
        kind: Group in the table.
        name: In the file.
        has_artifacts: The truth.
        make: Makes the model.
        pixels: Makes its images ``(N, 3, H, W)``.
    """

    kind: str
    name: str
    has_artifacts: bool
    make: Callable[[], Any]
    pixels: Callable[[], torch.Tensor]


def _drawn(run: str) -> Callable[[], torch.Tensor]:
    task = RECIPES["tiles" if run.startswith("tiles") else "mosaics"].task
    if run == "photographs":
        task = replace(task, backdrop="photographs")
    return partial(_images_of, task)


def _has_artifacts(run: str, seed: int) -> bool:
    (told,) = (entry for entry in json.loads(CURVES.read_text())["runs"] if entry["name"] == run)
    last = told["curves"][-1]["seeds"][told["seeds"].index(seed)]
    return bool(max(last["outliers"]) >= OUTLIERS and max(last["attention"]) >= ATTENTION)


def _backbone(read: Callable[..., Any], *args: Any) -> Any:
    return read(*args).backbone


def packaged() -> Iterator[Subject]:
    """What the package ships."""
    for recipe in RECIPES:
        for twin in (None, "registers"):
            run = "-".join(filter(None, (recipe, twin)))
            make = partial(_backbone, load_grown, recipe, twin)
            yield Subject("grown, packaged", run, _has_artifacts(run, 0), make, _drawn(run))


def grown(folder: Path | None) -> Iterator[Subject]:
    """What lies in a folder of grown models."""
    for path in sorted(folder.glob("*/seed-*")) if folder is not None else ():
        run, seed = path.parent.name, int(path.name.removeprefix("seed-"))
        kind = "grown" if _has_artifacts(run, seed) else "grown, with registers or CLS from the start"
        make = partial(_backbone, read_grown, path)
        yield Subject(kind, f"{run}/{path.name}", _has_artifacts(run, seed), make, _drawn(run))


def since(folder: Path | None) -> Iterator[Subject]:
    """What lies in a folder of models that grew later; each run is asked about images of its own task."""
    for path in sorted(folder.glob("*/seed-*")) if folder is not None else ():
        run, seed = path.parent.name, int(path.name.removeprefix("seed-"))
        told = json.loads((path.parent / "curves.json").read_text("utf-8"))["recipe"]["task"]
        pixels = partial(_images_of, MosaicTask.from_dict(told))
        kind = f"{SINCE}, {'with' if _has_artifacts(run, seed) else 'without'} artifacts"
        make = partial(_backbone, read_grown, path)
        yield Subject(kind, f"{run}/{path.name}", _has_artifacts(run, seed), make, pixels)


def _images_of(task: MosaicTask) -> torch.Tensor:
    return task.draw(IMAGES, seed=SEED).pixel_values


def _scenes() -> torch.Tensor:
    return pixels_of(IMAGES, 77, "test")[0]


@cache
def _case(name: str) -> Any:
    return CASES[name]()


def _planted(block: int, strength: float, steps: int) -> Any:
    pixels = pixels_of(128, 41)[0]
    return plant_artifacts(load_vit(), block, pixels, strength=strength, seed=block, attraction_steps=steps).model


def _base_of(name: str) -> Any:
    return _case(name).base()


def _twin_of(name: str) -> Any:
    return _case(name).twin


def planted() -> Iterator[Subject]:
    """Planted models and their clean twins; plantings that attract nothing too."""
    for name in CASES:
        yield Subject("planted", name, True, partial(_base_of, name), _scenes)
        yield Subject("clean twins", name, False, partial(_twin_of, name), _scenes)
    for block, strength in ((1, 8.0), (2, 5.0)):
        for steps in (20, 0):
            name = f"shipped, block {block}, {strength:g} x{'' if steps else ', idle'}"
            yield Subject("planted", name, True, partial(_planted, block, strength, steps), _scenes)


def _random(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = getattr(tf, f"{name}Model")(getattr(tf, f"{name}Config")(**_SHAPE, **RANDOM[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def random() -> Iterator[Subject]:
    """Models with random weights, larger than transformers draws them, so that tokens differ."""
    for name in RANDOM:
        for seed in (0, 1):
            yield Subject("random", f"{name} {seed}", False, partial(_random, name, seed), _scenes)


def look(subject: Subject) -> dict[str, Any]:
    """What audit and fit say of one model."""
    model, pixels = subject.make(), subject.pixels()
    report = audit(model, pixels, progress=False)
    try:
        if isinstance(model, PeftModel):
            raise UnsupportedModelError("it has registers")
        fit: str = (
            fit_test_time_registers(model, pixels, progress=False).peft_config["default"].test_time_fit["verdict"]
        )
    except NoArtifactsError:
        fit = "none"
    except UnsupportedModelError as error:
        fit = f"not supported: {error}"
    except RegisterAdapterError as error:
        fit = f"present, not fitted: {error}"
    blocks = [layer.gathered for layer in report.layers[1:] if layer.gathered is not None]
    return {
        "kind": subject.kind,
        "name": subject.name,
        "has_artifacts": subject.has_artifacts,
        "verdict": report.verdict,
        "evidence": report.evidence,
        "sinks": report.kind,
        "unexplained": report.unexplained,
        "fit": fit,
        "blocks": [[round(block.attention, 4), block.value_ratio and round(block.value_ratio, 4)] for block in blocks],
    }


def _says(row: dict[str, Any], least: float, factor: float) -> bool:
    """Whether the verdict on a row is that there are artifacts, for other limits of the attention's evidence."""
    by_norms = row["evidence"] in ("norms", "both")
    far = (ratio is not None and (ratio <= factor or ratio >= 1 / factor) for _, ratio in row["blocks"])
    return by_norms or any(told and block[0] >= least for told, block in zip(far, row["blocks"], strict=True))


def _confusion(rows: list[dict[str, Any]], says: Callable[[dict[str, Any]], bool]) -> dict[str, int]:
    counts = dict.fromkeys(("told", "missed", "clean", "false_alarms"), 0)
    for row in rows:
        counts[
            ("told" if says(row) else "missed") if row["has_artifacts"] else "false_alarms" if says(row) else "clean"
        ] += 1
    return counts


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Confusion matrices, and the limits with the fewest errors on every other model of a kind."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    before = [some for kind, some in kinds.items() if not kind.startswith(SINCE)]
    chosen_on = [row for some in before for row in some[::2]]
    others = [row for some in before for row in some[1::2]]
    errors = {}
    for least in ATTENTIONS:
        for factor in FACTORS:
            counts = _confusion(chosen_on, partial(_says, least=least, factor=factor))
            errors[least, factor] = counts["missed"] + counts["false_alarms"]
    best = [list(limits) for limits, count in errors.items() if count == min(errors.values())]
    by_audit, by_norms = (lambda row: row["verdict"] != "none"), (lambda row: row["evidence"] in ("norms", "both"))
    later = [row for row in rows if row["kind"].startswith(SINCE)]
    parts = {"chosen on": chosen_on, "others": others, SINCE: later, "all": rows}
    return {
        "limits": {"attention": MOST, "far_below": FAR_BELOW, "far_above": FAR_ABOVE},
        "fewest_errors": {"errors": min(errors.values()), "limits": best},
        "confusion": {name: _confusion(some, by_audit) for name, some in parts.items()},
        "confusion_by_norms_alone": {name: _confusion(some, by_norms) for name, some in parts.items()},
        "by_kind": {name: _counts(some) for name, some in kinds.items()},
        "fit_disagrees": [row["name"] for row in rows if _disagrees(row)],
    }


def _counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    said = [row["evidence"] or ("none, with a warning" if row["unexplained"] else "none") for row in rows]
    return {"models": len(rows), **{word: said.count(word) for word in sorted(set(said))}}


def _disagrees(row: dict[str, Any]) -> bool:
    return not row["fit"].startswith("not supported") and (row["fit"] == "none") != (row["verdict"] == "none")


def make_table(result: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| models | norms alone: told, missed, clean, false alarms | norms and attention |", "| --- | --- | --- |"]
    names = {"chosen on": "half that limits were chosen on", "others": "the other half"}
    for part in result["confusion"]:
        name = names.get(part, part)
        cells = [
            f"{c['told']}, {c['missed']}, {c['clean']}, {c['false_alarms']}"
            for c in (result["confusion_by_norms_alone"][part], result["confusion"][part])
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    words = ("both", "norms", "attention", "none", "none, with a warning")
    lines += ["", f"| kind | models | {' | '.join(words)} |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for kind, counts in result["by_kind"].items():
        lines.append(f"| {kind} | {counts['models']} | {' | '.join(str(counts.get(word, 0)) for word in words)} |")
    return lines


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    result = {
        "config": {"images": IMAGES, "seed": SEED, "truth": {"outliers": OUTLIERS, "attention": ATTENTION}},
        "versions": versions(),
        "hardware": machine(torch.device("cpu")),
        "commit": git_commit(),
        **summarise(rows),
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Look at all models; rows that the file has already are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grown", type=Path, help="folder of grown models")
    parser.add_argument("--since", type=Path, help="folder of models that grew after the limits were set")
    parser.add_argument("--only", nargs="+", choices=["packaged", "grown", "planted", "random", "since"])
    parser.add_argument("--out", type=Path, default=Path("verdicts.json"))
    parser.add_argument("--docs", type=Path, help="folder whose audit.md gets the tables")
    args = parser.parse_args(argv)
    sources = {"packaged": packaged(), "grown": grown(args.grown), "planted": planted(), "random": random()}
    sources["since"] = since(args.since)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    known = {(row["kind"], row["name"]) for row in rows}
    for subject in (s for name in args.only or sources for s in sources[name]):
        if (subject.kind, subject.name) not in known:
            row = look(subject)
            rows.append(row)
            said = f"{row['kind']}: {row['name']}: {row['verdict']}, {row['evidence']}; fit: {row['fit'][:40]}\n"
            sys.stdout.write(said)
            sys.stdout.flush()
            _write(args.out, rows)
    _write(args.out, rows)
    if args.docs is not None:
        page = args.docs / "audit.md"
        before, _, rest = page.read_text("utf-8").partition(_BEGIN)
        table = make_table(summarise(rows))
        page.write_text("\n".join([before + _BEGIN, *table, _END]) + rest.partition(_END)[2], "utf-8")


if __name__ == "__main__":
    main()
