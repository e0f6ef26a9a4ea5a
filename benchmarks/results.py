"""Make the tables and figures of ``results.md``, ``grown.md`` and ``ablations.md`` again: what ``make results`` runs.

    python benchmarks/results.py            # about ten minutes on two cores
    python benchmarks/results.py --render   # tables and figures alone, from the committed reports

Reports in ``benchmarks/results`` took hours on a GPU and on CPUs. Here a part of them is computed again, on this
machine: the first seed of every arm that needs no training, of the trained arms that the pages rest on, all arms of the
packaged grown models, and the operations of a forward pass. Each new row is compared with the committed one, and what
differs by more than a tolerance is named: another machine rounds otherwise, and training makes more of it. Then every
table and figure is made from the committed reports. Those of this machine are in ``--scratch``; a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ablations
import downstream
import grown_memory
import grown_repair
import grown_report
import quantised
import repair_table
from measuring import describe_machine
from repair_arms import ARMS
from rich.console import Console
from rich.table import Table
from tables import put_between, row_key, write_report
from tqdm.auto import tqdm

from register_adapter.utils.environment import git_commit

__all__ = ["main", "render"]

HERE = Path(__file__).parent
RESULTS, ROOT = HERE / "results", HERE.parent
RECIPE = "silenced teacher, hard patches: registers + LoRA behind"
UNTRAINED = [arm.name for arm in ARMS if not arm.trained]
#: Figures that are compared, and by how much they may differ: of shares, accuracies and cosines, absolutely.
TOLERANCES = {
    "outlier_share": 0.005,
    "cosine_planted": 0.03,
    "accuracy": 0.02,
    "knn": 0.03,
    "linear": 0.03,
    "segmentation": 0.03,
    "zero_shot": 0.03,
    "tokencut": 0.03,
    "contents_at_outliers": 0.1,
    "task_loss": 0.0005,
    "flops": 0.0,
}


@dataclass(frozen=True)
class Step:
    """A part of a committed report that is computed again.

    Attributes:
        report: Name of the committed report's file.
        command: Arguments of the benchmark, without where it writes.
    """

    report: str
    command: tuple[str, ...]


def _repair(*arms: str) -> Step:
    return Step("repair.json", ("repair.py", "--models", "shipped", "--seeds", "0", "--arms", *arms))


def _grown(recipe: str, *arms: str) -> Step:
    command = ("grown_repair.py", "--recipes", recipe, "--steps", "60")
    return Step("grown-repair.json", (*command, *(("--arms", *arms) if arms else ())))


STEPS = (
    _repair(*UNTRAINED),
    _repair("silenced teacher: registers", "silenced teacher: registers + LoRA", "smooth: registers + LoRA"),
    _repair(RECIPE),
    Step(
        "downstream.json",
        ("downstream.py", "--seeds", "0", "--arms", "clean twin", "planted model", "test-time register"),
    ),
    _grown("tiles"),
    _grown("mosaics"),
    Step("ablation-flops.json", ("ablations.py", "benchmarks/ablations/flops.json")),
)


def forget_others(scratch: Path) -> None:
    """Remove reports that were computed at another commit: they are of other code, and perhaps of other settings."""
    mark, commit = scratch / "commit", str(git_commit())
    scratch.mkdir(parents=True, exist_ok=True)
    if not mark.exists() or mark.read_text("utf-8") != commit:
        for number in range(len(STEPS)):
            shutil.rmtree(scratch / str(number), ignore_errors=True)
    mark.write_text(commit, "utf-8")


def compute(step: Step, number: int, scratch: Path) -> Path:
    """Run one step, and name its report; what its report has already is not computed again."""
    folder = scratch / str(number)
    out = folder / step.report
    where = ("--results", str(folder)) if step.command[0] == "ablations.py" else ("--out", str(out))
    script, *options = step.command
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (scratch / f"{number}.log").open("w") as log:
        subprocess.run(
            [sys.executable, str(HERE / script), *options, *where],
            check=True,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return out


def compare(step: Step, path: Path) -> Iterator[dict[str, Any]]:
    """Every figure of a new report beside the committed one."""
    mine, committed = (
        {row_key(row): row for row in json.loads(file.read_text("utf-8"))["rows"]}
        for file in (path, RESULTS / step.report)
    )
    for key in sorted(mine.keys() & committed.keys(), key=str):
        for figure, tolerance in TOLERANCES.items():
            if figure in mine[key]:
                here, there = mine[key][figure], committed[key][figure]
                row = {"report": step.report, "row": ", ".join(map(str, key)), "figure": figure}
                yield {**row, "committed": there, "here": here, "within": abs(here - there) <= tolerance}


def render(docs: Path, figures: bool = True) -> None:
    """Every table, and with ``figures`` every figure, from the committed reports."""

    def load(name: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((RESULTS / name).read_text("utf-8"))
        return report

    repair_table.write_table(load("repair.json"), docs / "results.md")
    downstream.write_table(load("downstream.json"), docs / "results.md")
    put_between(docs / "results.md", "quantised", quantised.make_table(load("quantised.json")["rows"]))
    put_between(docs / "grown.md", "grown-repair", grown_repair.make_table(load("grown-repair.json")["rows"]))
    put_between(docs / "grown.md", "grown-memory", grown_memory.make_tables(load("grown-memory.json")["rows"]))
    put_between(docs / "grown.md", "grown", grown_report.make_table())
    for path in sorted(RESULTS.glob("ablation-*.json")):
        ablations.write_table(load(path.name), docs / "ablations.md")
        if figures:
            ablations.draw(load(path.name), docs / "images")
    if figures:
        grown_report.main(["--docs", str(docs)])


def main(argv: list[str] | None = None) -> int:
    """Compute, compare and render; the number of figures that differ by more than their tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "results", help="folder of new reports")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages, default docs")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="steps at a time, default one a core")
    parser.add_argument("--render", action="store_true", help="compute nothing")
    args = parser.parse_args(argv)
    figures: list[dict[str, Any]] = []
    if not args.render:
        forget_others(args.scratch)
        with ThreadPoolExecutor(args.workers) as pool, tqdm(total=len(STEPS), unit="step") as bar:
            running = [pool.submit(compute, step, number, args.scratch) for number, step in enumerate(STEPS)]
            for step, future in zip(STEPS, running, strict=True):
                figures += compare(step, future.result())
                bar.update()
        write_report({"benchmark": "results", **describe_machine(), "rows": figures}, args.scratch / "results.json")
        show(figures)
    render(args.docs)
    return sum(not row["within"] for row in figures)


def show(figures: list[dict[str, Any]]) -> None:
    """What differs, and how many figures do not."""
    apart = [row for row in figures if not row["within"]]
    console = Console()
    if apart:
        table = Table(
            "report", "row", "figure", "committed", "here", title="figures that differ by more than their tolerance"
        )
        for row in apart:
            table.add_row(row["report"], row["row"], row["figure"], f"{row['committed']:.4g}", f"{row['here']:.4g}")
        console.print(table)
    console.print(f"{len(figures) - len(apart)} of {len(figures)} figures are those of the committed reports")


if __name__ == "__main__":
    main()
