"""How well the learned detector finds planted artifacts, against every norm rule, on images that nobody trained on.

For each planted model a detector is trained on its attention over images without labels, and scores other images;
the truth is what the planted neurons wrote into. See README.md beside this file.

    python benchmarks/detector.py --out benchmarks/results/detector-cpu.json --picture docs/images/detector.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import describe_machine
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import nn
from tqdm import tqdm

from register_adapter import capture
from register_adapter.artifacts import AttentionDetector, apply_rule, train_detector
from register_adapter.testbed import Planting, SceneDataset, load_vit, plant_artifacts
from register_adapter.testbed.plant_low import plant_low_norm_artifacts

STRENGTHS, SHARES = (2.0, 3.0, 5.0, 8.0, 10.0), (0.005, 0.01, 0.02, 0.05)
RULES = ("auto", "mixture", "mad", "sigma", "percentile", "two_sided_mad", "two_sided_sigma", "two_sided_percentile")
#: Three times the median, the fixed threshold that the package's own norm summary has.
FACTOR = 3.0
#: Seeds of images: planted on, trained on, norm layers chosen on, reported on. The last ones have other photographs.
FIT, TRAIN, CHOOSE, REPORT = 0, 370_001, 380_001, 390_001
#: Images of the clean twin, to see how often something is found where nothing is.
CLEAN, CLEAN_RUNS = 400_001, 10
PATCH = 8
MIN_AUROC = 0.95


@dataclass(frozen=True)
class Case:
    """One planted model.

    Attributes:
        group: ``"high"``, ``"low"`` (norm below or like everybody's) or ``"random"`` (a large vector that attracts
            nothing).
        size: ``strength`` of a high norm, ``norm`` of a low one.
        share: Share of the patches.
        layer: Block with the neurons.
        seed: Of the planting and of the detector.
    """

    group: str
    size: float
    share: float
    layer: int
    seed: int

    def plant(self, model: nn.Module, pixel_values: torch.Tensor) -> Planting:
        """The planted copy of ``model``."""
        options: dict[str, Any] = {"share": self.share, "seed": self.seed}
        if self.group == "low":
            return plant_low_norm_artifacts(model, self.layer, pixel_values, norm=self.size, **options)
        steps = 0 if self.group == "random" else 20
        return plant_artifacts(model, self.layer, pixel_values, strength=self.size, attraction_steps=steps, **options)


def cases() -> list[Case]:
    """What is reported: other seeds than those that the detector was made with (below 3000)."""
    layers = (3, 4, 2, 5, 1)
    high = [
        Case("high", strength, share, layers[(row + column) % len(layers)], 3600 + 10 * row + column)
        for row, strength in enumerate(STRENGTHS)
        for column, share in enumerate(SHARES)
    ]
    low = [
        Case("low", norm, percent / 100, layer, 3700 + number)
        for number, (norm, percent, layer) in enumerate(
            zip(
                (0.3, 0.4, 0.4, 0.5, 0.6, 0.8, 1.0, 1.0),
                (2, 0.5, 2, 5, 1, 2, 2, 5),
                (3, 4, 2, 3, 5, 4, 3, 4),
                strict=True,
            )
        )
    ]
    random = [Case("random", strength, 0.02, 3, 3800 + number) for number, strength in enumerate((2.0, 8.0))]
    return [*high, *low, *random]


def make_images(count: int, seed: int, split: Any) -> torch.Tensor:
    """``(count, 3, 80, 80)`` scenes, scaled to -1…1."""
    scenes = SceneDataset(count, seed=seed, split=split)
    stacked = torch.stack([torch.from_numpy(scenes.scene(index).image) for index in range(count)])
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def norms(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """``(layers, M, patches)`` L2 norms behind every block, before the final LayerNorm."""
    parts = []
    for batch in torch.split(pixel_values, 64):
        with capture(model, attentions=False) as trace:
            model(pixel_values=batch)
        layers = range(1, len(trace.hidden_states))
        parts.append(torch.stack([trace.patches(layer).norm(dim=-1) for layer in layers]))
    return torch.cat(parts, 1)


def ranking(truth: torch.Tensor, scores: torch.Tensor) -> dict[str, float]:
    """AUROC, average precision, and the best F1 that any threshold would give (chosen with the truth)."""
    labels, values = truth.flatten().numpy(), scores.flatten().numpy()
    precision, recall, _ = precision_recall_curve(labels, values)
    best = (2 * precision * recall / np.clip(precision + recall, 1e-9, None)).max()
    measures = {
        "auroc": roc_auc_score(labels, values),
        "ap": average_precision_score(labels, values),
        "best_f1": best,
    }
    return {name: round(float(value), 4) for name, value in measures.items()}


def f1(truth: torch.Tensor, flagged: torch.Tensor) -> float:
    """F1 of a decision."""
    return round(2 * float((truth & flagged).sum()) / max(float(truth.sum() + flagged.sum()), 1.0), 4)


def norm_rules(
    chosen: torch.Tensor, chosen_truth: torch.Tensor, tested: torch.Tensor, truth: torch.Tensor
) -> dict[str, dict[str, Any]]:
    """Every norm rule at the layer where it does best on other images *with* their truth, which is an advantage.

    Args:
        chosen: ``(layers, M, P)`` norms of the images that layers and thresholds are chosen on.
        chosen_truth: ``(M, P)`` bool.
        tested: ``(layers, M', P)`` norms of the images that are reported.
        truth: ``(M', P)`` bool.
    """
    median = chosen.flatten(1).log().median(1).values[:, None, None]
    scores = {
        "norm": (chosen, tested),
        "two-sided |log norm - median|": ((chosen.log() - median).abs(), (tested.log() - median).abs()),
    }
    results: dict[str, dict[str, Any]] = {}
    for name, (before, after) in scores.items():
        values = [average_precision_score(chosen_truth.flatten(), layer.flatten()) for layer in before]
        best = int(np.argmax(values))
        results[name] = {"layer": best + 1, **ranking(truth, after[best])}

    def decide(name: str, masks: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        best = max(range(len(masks)), key=lambda layer: f1(chosen_truth, masks[layer][0]))
        results[name] = {"layer": best + 1, "f1": f1(truth, masks[best][1])}

    usual = chosen.flatten(1).median(1).values
    decide(
        "fixed 3 x median", [(a > FACTOR * m, b > FACTOR * m) for a, b, m in zip(chosen, tested, usual, strict=True)]
    )
    for rule in RULES:
        thresholds = [apply_rule(rule, layer) for layer in chosen]
        decide(
            rule,
            [
                (threshold.outliers(a), threshold.outliers(b))
                for threshold, a, b in zip(thresholds, chosen, tested, strict=True)
            ],
        )
    return results


@dataclass(frozen=True)
class Images:
    """All images that a run needs."""

    fit: torch.Tensor
    train: torch.Tensor
    choose: torch.Tensor
    report: torch.Tensor

    @classmethod
    def draw(cls, number: int) -> Images:
        """``number`` to train on, and fewer of the others."""
        fit = torch.cat([make_images(number * 3 // 10, FIT, "train"), make_images(number // 10, FIT + 1, None)])
        return cls(
            fit,
            make_images(number, TRAIN, "train"),
            make_images(number // 2, CHOOSE, "train"),
            make_images(number // 2 + number // 4, REPORT, "test"),
        )


def run_case(case: Case, clean: nn.Module, images: Images, steps: int) -> tuple[dict[str, Any], AttentionDetector]:
    """Plant, train, score, compare."""
    planting = case.plant(clean, images.fit)
    model, truth = planting.model, planting.hits(images.report)
    start = time.perf_counter()
    detector = train_detector(model, images.train, num_steps=steps, seed=case.seed, progress=False)
    seconds = time.perf_counter() - start
    scores = detector.score(model, images.report).flatten(1)
    tested = norms(model, images.report)
    compared = norm_rules(norms(model, images.choose), planting.hits(images.choose), tested, truth)
    usual = tested.flatten(1).median(1).values
    ratio = [float(layer[truth].median() / middle) for layer, middle in zip(tested, usual, strict=True)]
    detected = {
        **ranking(truth, scores),
        "surprise_alone": ranking(truth, detector.score(model, images.report, template=False).flatten(1)),
        "template": detector.has_template,
        "f1": f1(truth, detector.outliers(scores)),
        "threshold": detector.config.threshold,
        "parameters": detector.num_parameters,
        "train_seconds": round(seconds, 1),
    }
    result = {
        **asdict(case),
        "hits": round(float(truth.float().mean()), 4),
        "hit_norm_over_median_by_layer": [round(value, 3) for value in ratio],
        "detector": detected,
        "norm_rules": compared,
    }
    return result, detector


def run_extras(clean: nn.Module, images: Images, steps: int) -> dict[str, Any]:
    """The clean twin, and a detector on a model whose artifacts lie elsewhere."""
    runs = []
    for seed in tqdm(range(CLEAN_RUNS), desc="clean twin", unit="detector"):
        trained_on = make_images(len(images.train), CLEAN + 1000 * seed, "train" if seed % 2 else None)
        alone = train_detector(clean, trained_on, num_steps=steps, seed=seed, progress=False)
        flagged = alone.outliers(alone.score(clean, images.report))
        runs.append({"template": alone.has_template, "flagged_share": round(float(flagged.float().mean()), 5)})
    extras: dict[str, Any] = {"clean_twin": runs}
    trained, other = Case("high", 5.0, 0.02, 3, 3901), Case("high", 5.0, 0.02, 4, 3902)
    _, detector = run_case(trained, clean, images, steps)
    planting = other.plant(clean, images.fit)
    truth = planting.hits(images.report)
    moved = {"of another planted model": detector, "of the clean twin": alone}
    extras["transfer"] = {"scored": asdict(other), "trained": asdict(trained)}
    for name, moved_detector in moved.items():
        scores = moved_detector.score(planting.model, images.report).flatten(1)
        alone_scores = moved_detector.score(planting.model, images.report, template=False).flatten(1)
        extras["transfer"][name] = {
            **ranking(truth, scores),
            "f1": f1(truth, moved_detector.outliers(scores)),
            "surprise_alone": ranking(truth, alone_scores),
        }
    larger = torch.nn.functional.interpolate(images.report, size=(112, 112), mode="bicubic", antialias=True)
    truth = planting.hits(larger)
    scores = detector.score(planting.model, larger).flatten(1)
    extras["transfer"]["of another planted model, at 112 px"] = {
        **ranking(truth, scores),
        "hits": float(truth.float().mean()),
    }
    return extras


def check_targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, one line a planted model."""
    targets: list[dict[str, Any]] = []
    for result in results:
        where = {key: result[key] for key in ("group", "size", "share", "layer", "seed")}
        detector, rules = result["detector"], result["norm_rules"]
        if rules["norm"]["auroc"] >= MIN_AUROC:
            passed = detector["auroc"] >= MIN_AUROC
            targets.append(
                {
                    "target": "AUROC where the norm works",
                    **where,
                    "value": detector["auroc"],
                    "limit": MIN_AUROC,
                    "passed": passed,
                }
            )
        if result["group"] == "low" or (result["group"] == "high" and result["size"] <= 2):
            for key in ("auroc", "ap", "f1"):
                limit = max(rule[key] for rule in rules.values() if key in rule)
                targets.append(
                    {
                        "target": f"{key} above every norm rule's",
                        **where,
                        "value": detector[key],
                        "limit": limit,
                        "passed": detector[key] > limit,
                    }
                )
    return targets


def draw(report: dict[str, Any], clean: nn.Module, images: Images, steps: int, path: Path) -> None:
    """The figure of docs/detector.md: average precision over strength, F1 by group, and images with their maps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(11, 7.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    curve, bars = upper.subplots(1, 2, width_ratios=(1, 1.3))
    high = [result for result in report["results"] if result["group"] == "high"]
    sizes = sorted({result["size"] for result in high})
    curves: tuple[tuple[str, str, str, Callable[[Any], float]], ...] = (
        ("detector", "C0", "-", lambda result: result["detector"]["ap"]),
        ("surprise alone", "C0", ":", lambda result: result["detector"]["surprise_alone"]["ap"]),
        ("raw norm, best layer", "C1", "--", lambda result: result["norm_rules"]["norm"]["ap"]),
    )
    for name, colour, style, read in curves:
        values = [[read(result) for result in high if result["size"] == size] for size in sizes]
        curve.plot(sizes, [np.median(value) for value in values], style, color=colour, marker="o", label=name)
        curve.fill_between(sizes, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12)
    curve.set(xlabel="strength (norm over the median)", ylabel="average precision", ylim=(0, 1.03))
    curve.set_title("high norm: median and range over shares", fontsize=10)
    curve.legend(fontsize=8, loc="lower right")

    groups = {
        "high, 5x to 10x": [r for r in high if r["size"] >= 5],
        "weak, 2x": [r for r in high if r["size"] == 2],
        "low norm": [r for r in report["results"] if r["group"] == "low" and r["size"] < 0.7],
        "usual norm": [r for r in report["results"] if r["group"] == "low" and r["size"] >= 0.7],
        "no attraction": [r for r in report["results"] if r["group"] == "random"],
    }
    groups = {name: members for name, members in groups.items() if members}
    rules = [name for name, rule in report["results"][0]["norm_rules"].items() if "f1" in rule]
    width = 0.85 / (len(rules) + 1)
    shades = plt.get_cmap("Oranges")(np.linspace(0.3, 0.85, len(rules)))
    for place, name in enumerate(["detector", *rules]):
        values = [
            np.mean([r["detector"]["f1"] if name == "detector" else r["norm_rules"][name]["f1"] for r in members])
            for members in groups.values()
        ]
        colour = "C0" if name == "detector" else shades[place - 1]
        bars.bar(np.arange(len(groups)) + place * width, values, width, color=colour, label=name)
    bars.set_xticks(np.arange(len(groups)) + 0.4, list(groups), fontsize=8)
    bars.set(ylabel="mean F1 on held-out images", ylim=(0, 1.03))
    bars.set_title("each norm rule at its best layer", fontsize=10)
    bars.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    case = next(case for case in cases() if case.group == "low")
    planting = case.plant(clean, images.fit)
    detector = train_detector(planting.model, images.train, num_steps=steps, seed=case.seed, progress=False)
    truth = planting.hits(images.report)
    shown = truth.sum(1).argsort(descending=True, stable=True)[: 6 * 5 : 6]
    pixel_values = images.report[shown]
    side = pixel_values.shape[-1] // PATCH
    rows = {
        "image": pixel_values.permute(0, 2, 3, 1) / 2 + 0.5,
        "planted": truth[shown].view(-1, side, side),
        "L2 norm": norms(planting.model, pixel_values)[case.layer].view(-1, side, side),
        "detector": detector.score(planting.model, pixel_values),
    }
    lower.suptitle(
        f"artifacts of low norm ({case.size:g} of the median behind block {case.layer}), held-out images", fontsize=10
    )
    for place, (axis, (column, (name, maps))) in enumerate(
        zip(
            lower.subplots(4, len(shown)).T.flatten(),
            [(column, row) for column in range(len(shown)) for row in rows.items()],
            strict=True,
        )
    ):
        axis.imshow(maps[column].clamp_min(0) if name == "image" else maps[column].float(), interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        if place < len(rows):
            axis.set_ylabel(name, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def summary(report: dict[str, Any]) -> str:
    """The report as a Markdown table, a line a planted model."""
    lines = [
        "| planted | size | hits | block | detector AUROC / AP / F1 | surprise | norm | two-sided | best rule's F1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in report["results"]:
        mine, rules = result["detector"], result["norm_rules"]
        best = max((name for name in rules if "f1" in rules[name]), key=lambda name: rules[name]["f1"])
        sided = rules["two-sided |log norm - median|"]
        lines.append(
            f"| {result['group']} | {result['size']:g} | {result['hits']:.2%} | {result['layer']} "
            f"| {mine['auroc']:.3f} / {mine['ap']:.3f} / {mine['f1']:.3f} "
            f"| {mine['surprise_alone']['auroc']:.3f} / {mine['surprise_alone']['ap']:.3f} "
            f"| {rules['norm']['auroc']:.3f} / {rules['norm']['ap']:.3f} | {sided['auroc']:.3f} / {sided['ap']:.3f} "
            f"| {rules[best]['f1']:.3f} ({best}) |"
        )
    targets = report["targets"]
    for name in sorted({target["target"] for target in targets}):
        group = [target["passed"] for target in targets if target["target"] == name]
        lines.append(f"\n{name}: {sum(group)} of {len(group)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run all cases, write the report after each of them, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=320, help="images to train on; three quarters as many are scored")
    parser.add_argument("--steps", type=int, default=500, help="training steps of a detector")
    parser.add_argument("--every", type=int, default=1, help="every so many-th planted model alone, for a trial")
    parser.add_argument("--resume", action="store_true", help="leave out what the report already has")
    parser.add_argument("--max-minutes", type=float, default=1e9, help="start no further model after this time")
    parser.add_argument("--no-extras", action="store_true", help="leave out the clean twin and the transfers")
    parser.add_argument("--out", type=Path, default=Path("detector.json"))
    parser.add_argument("--picture", type=Path, default=None, help="draw the figure of docs/detector.md")
    args = parser.parse_args(argv)
    clean, images = load_vit(), Images.draw(args.images)
    started = time.time()
    earlier = 0.0
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report: dict[str, Any] = {"benchmark": "detector", "config": config, **describe_machine(), "results": []}

    def write() -> None:
        report["targets"] = check_targets(report["results"])
        report.update(seconds=round(earlier + time.time() - started, 1), load_average=os.getloadavg())
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")

    if args.resume and args.out.is_file():
        before = json.loads(args.out.read_text())
        report["results"], earlier = before["results"], before["seconds"]
        report.update({key: before[key] for key in ("clean_twin", "transfer") if key in before})
    done = [{key: result[key] for key in Case.__dataclass_fields__} for result in report["results"]]
    for case in tqdm([case for case in cases()[:: args.every] if asdict(case) not in done], unit="model"):
        if time.time() - started > 60 * args.max_minutes:
            return report
        result, _ = run_case(case, clean, images, args.steps)
        report["results"].append(result)
        write()
    if not args.no_extras and "transfer" not in report:
        report.update(run_extras(clean, images, args.steps))
        write()
    write()
    if args.picture is not None:
        draw(report, clean, images, args.steps, args.picture)
    return report


if __name__ == "__main__":
    sys.stdout.write(summary(main()) + "\n")
