"""What registers cost: time and memory of base, base + adapter and native Dinov2WithRegisters, and the time to wrap.

Three models of one shape, with random weights, run in one process and take turns, so that a busy machine slows all of
them alike; what is reported are medians of the ratios within a turn, with the 10th and 90th percentile. See README.md
beside this file for what exactly is compared.

    python benchmarks/overhead.py --models s --sizes 224 --batches 1 --out overhead.json
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from measuring import Turns, clock, describe_machine, free_bytes, memory, spread
from torch import nn
from tqdm import tqdm
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from register_adapter import add_registers

#: Width, blocks, heads; "tiny" is for the test of this file.
SHAPES = {"tiny": (32, 2, 2), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}
PATCH = 14
STEPS = ("forward", "train")
RATIOS = (("adapter", "native"), ("adapter", "base"), ("native", "base"))
CONTROL = ("again", "native")
MAX_OF_NATIVE, MAX_OF_BASE, MAX_MEMORY_DRIFT, MAX_WRAP_MS = 1.01, 1.03, 0.01, 50.0
LATE_RATIOS = (("half", "start"),)
MAX_LATE_TIME, MAX_LATE_MEMORY = 0.8, 0.6


@dataclass(frozen=True)
class Case:
    """One line of the results: what was run, and how."""

    device: str
    model: str
    size: int
    dtype: str
    batch: int
    compiled: bool
    step: str


def build(model: str, size: int, registers: int, seed: int = 0, control: bool = False) -> dict[str, nn.Module]:
    """The three models, in float32 on the CPU, each with its trained parameters alone requiring a gradient.

    Args:
        model: Shape, a key of ``SHAPES``.
        size: Image side.
        registers: Number of registers.
        seed: Of the weights, and of the order in which the models are made.
        control: Make a second native model too, ``"again"``.
    """
    width, blocks, heads = SHAPES[model]
    # Position embeddings of the size in use: interpolation differs between the two classes and is no cost of registers.
    kwargs = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": PATCH,
    }
    torch.manual_seed(seed)

    def native() -> nn.Module:
        config = Dinov2WithRegistersConfig(**kwargs, num_register_tokens=registers)
        return cast(nn.Module, Dinov2WithRegistersModel(config))

    makers: dict[str, Callable[[], nn.Module]] = {
        "base": lambda: Dinov2Model(Dinov2Config(**kwargs)),
        "adapter": lambda: add_registers(Dinov2Model(Dinov2Config(**kwargs)), num_registers=registers),
        "native": native,
        **({"again": native} if control else {}),
    }
    order = list(makers)
    random.Random(seed).shuffle(order)
    models = {name: makers[name]() for name in order}
    # The base has no registers; its CLS token enters at the same place, so its backward pass has the same extent.
    for name, module in models.items():
        trained = {"base": "embeddings.cls_token", "adapter": ""}.get(name, "embeddings.register_tokens")
        for key, parameter in module.named_parameters() if trained else ():
            parameter.requires_grad_(key == trained)
    return models


def build_late(model: str, size: int, registers: int) -> dict[str, nn.Module]:
    """Two adapters: registers from block 0 on (``start``), and from the middle on (``half``)."""
    width, blocks, heads = SHAPES[model]
    models: dict[str, nn.Module] = {}
    for name, insert_layer in (("start", 0), ("half", blocks // 2)):
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, image_size=size, patch_size=PATCH
        )
        models[name] = add_registers(Dinov2Model(config), num_registers=registers, insert_layer=insert_layer)
    return models


def make_call(module: nn.Module, pixel_values: torch.Tensor, step: str) -> Callable[[], None]:
    """One forward pass without gradients, or one training step, as a function of no arguments."""
    module.train(step == "train")
    if step == "forward":

        def forward() -> None:
            with torch.no_grad():
                module(pixel_values=pixel_values)

        return forward

    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)

    def train() -> None:
        optimizer.zero_grad()
        module(pixel_values=pixel_values).last_hidden_state.float().square().mean().backward()
        optimizer.step()

    return train


def expected_bytes(case: Case) -> int:
    """A rough estimate of what a case needs beside the weights: 16 values a token and channel in each block kept."""
    width, blocks, _ = SHAPES[case.model]
    tokens = (case.size // PATCH) ** 2 + 8
    kept = blocks if case.step == "train" else 1
    itemsize: int = getattr(torch, case.dtype).itemsize
    return case.batch * tokens * width * 16 * kept * itemsize


@contextmanager
def compiled(models: dict[str, nn.Module], wanted: bool) -> Iterator[dict[str, nn.Module]]:
    """The models under ``torch.compile``, or as they are; forgets compiled code on the way out."""
    if not wanted:
        yield models
        return
    try:
        # Dynamo itself runs eagerly past what it cannot compile; a failing compiler is an error here.
        yield {name: cast(nn.Module, torch.compile(module)) for name, module in models.items()}
    finally:
        torch._dynamo.reset()


def run_case(
    case: Case,
    models: dict[str, nn.Module],
    args: argparse.Namespace,
    ratios: Iterable[tuple[str, str]],
    turns: Turns,
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure one case.

    Args:
        case: What to run.
        models: The variants that take turns, by name.
        args: The command line's.
        ratios: Pairs of variants to compare.
        turns: What earlier builds of the models took; this one's are added.
        earlier: The result of the earlier builds, whose bytes are those of this one.

    Raises:
        RuntimeError: It does not fit into the memory or the time, or cannot be compiled.
    """
    needed, free = expected_bytes(case), free_bytes(case.device)
    if needed > 0.8 * free:
        raise RuntimeError(f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    pixel_values = torch.randn(case.batch, 3, case.size, case.size).to(case.device, getattr(torch, case.dtype))
    with compiled(models, case.compiled) as ready:
        calls = {name: make_call(module, pixel_values, case.step) for name, module in ready.items()}
        turns.take(calls, case.device, args.repeats, args.min_time, args.budget)
        result = asdict(case) | turns.report(ratios) | {"bytes": dict(earlier["bytes"]) if earlier else {}}
        for name, call in calls.items() if earlier is None else ():
            weights = [*models[name].parameters(), *models[name].buffers()]
            result["bytes"][name] = memory(call, weights, [pixel_values], case.device, case.compiled)
    for module in models.values():
        module.zero_grad(set_to_none=True)
    return result


def measure_wrapping(model: str, repeats: int) -> dict[str, Any]:
    """Milliseconds of ``add_registers``, with the registers taken off again between two calls."""
    width, blocks, heads = SHAPES[model]
    base = Dinov2Model(
        Dinov2Config(hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, image_size=518)
    )
    times: list[float] = []
    wrapped: list[Any] = []
    for _ in range(repeats + 1):
        times.append(1000 * clock(lambda: wrapped.append(add_registers(base)), "cpu"))
        wrapped.pop().unload()
    # The first call also imports what PEFT and transformers import late.
    return {"model": model, "repeats": repeats, "first_ms": round(times[0], 2), "ms": spread(times[1:], 2)}


def check_targets(
    results: list[dict[str, Any]], wrapping: list[dict[str, Any]], registers: int, late: Iterable[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Compare what was measured with what was to be reached."""
    targets: list[dict[str, Any]] = []

    def add(name: str, where: dict[str, Any], value: float, limit: float) -> None:
        targets.append(
            {"target": name, **where, "value": round(float(value), 4), "limit": limit, "passed": bool(value <= limit)}
        )

    for result in results:
        where = {key: result[key] for key in Case.__dataclass_fields__}
        add("time of adapter / native", where, result["ratios"]["adapter/native"]["median"], MAX_OF_NATIVE)
        if registers == 4 and result["size"] == 224:
            add("time of adapter / base", where, result["ratios"]["adapter/base"]["median"], MAX_OF_BASE)
        peaks = [result["bytes"][name]["activation_peak"] for name in ("adapter", "native")]
        if None not in peaks:
            add("peak memory, |adapter / native - 1|", where, abs(peaks[0] / peaks[1] - 1), MAX_MEMORY_DRIFT)
    for result in late:
        where = {key: result[key] for key in Case.__dataclass_fields__}
        add(
            "insert_layer at half the depth, time of a step",
            where,
            result["ratios"]["half/start"]["median"],
            MAX_LATE_TIME,
        )
        peaks = [result["bytes"][name]["activation_peak"] for name in ("half", "start")]
        if None not in peaks:
            add("insert_layer at half the depth, peak memory", where, peaks[0] / peaks[1], MAX_LATE_MEMORY)
    for wrap in wrapping:
        if wrap["model"] == "l":
            add("milliseconds to wrap a ViT-L", {"model": "l"}, wrap["ms"]["median"], MAX_WRAP_MS)
    return targets


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["s", "b", "l"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 518], help="image sides, multiples of 14")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], default=["cpu", "cuda"])
    parser.add_argument(
        "--compile", choices=["no", "yes", "both"], default="both", help="with torch.compile or without"
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--registers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20, help="turns a build; every variant is timed once a turn")
    parser.add_argument("--builds", type=int, default=1, help="how often the models are made anew, see README.md")
    parser.add_argument("--control", action="store_true", help="time a second native model too: again / native")
    parser.add_argument("--min-time", type=float, default=0.1, help="least seconds of one timing")
    parser.add_argument("--budget", type=float, default=300, help="most seconds for the timings of a case, each build")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="start no further case after this time")
    parser.add_argument("--out", type=Path, default=Path("overhead.json"))
    args = parser.parse_args(argv)
    if wrong := [size for size in args.sizes if size < PATCH or size % PATCH]:
        parser.error(f"--sizes must be multiples of {PATCH}, got {wrong}")
    if min(args.registers, args.repeats, args.builds, *args.batches) < 1:
        parser.error("--registers, --repeats, --builds and --batches must be at least 1")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run all cases, write the report after each of them, and return it."""
    args = parse(argv)
    started = time.time()
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    config["max_minutes"] = None if math.isinf(args.max_minutes) else args.max_minutes
    results: dict[Case, dict[str, Any]] = {}
    late: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    wrapping = [measure_wrapping(model, args.repeats) for model in args.models]
    report: dict[str, Any] = {
        "benchmark": "overhead",
        "config": config,
        **describe_machine(),
        "wrapping": wrapping,
    }

    def write() -> None:
        report.update(results=list(results.values()), insert_layer=late, skipped=skipped)
        report["targets"] = check_targets(report["results"], wrapping, args.registers, late)
        report.update(seconds=round(time.time() - started, 1), load_average=os.getloadavg())
        report["process_peak_rss_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")

    compile_modes = {"no": [False], "yes": [True], "both": [False, True]}[args.compile]
    devices = list(args.devices)
    if "cuda" in devices and not torch.cuda.is_available():
        devices.remove("cuda")
        skipped.append({"device": "cuda", "reason": "no CUDA device on this machine"})
        write()
    shapes = list(product(devices, args.models, args.sizes, args.dtypes))
    bar = tqdm(total=len(shapes) * args.builds * len(args.batches) * len(compile_modes) * len(args.steps), unit="case")
    for device, model, size, dtype in shapes if "train" in args.steps else ():
        case = Case(device, model, size, dtype, min(args.batches), False, "train")
        try:
            if time.time() - started > 60 * args.max_minutes:
                raise RuntimeError(f"not started: --max-minutes {args.max_minutes} are over")
            variants = build_late(model, size, args.registers).items()
            moved = {name: module.to(device, getattr(torch, dtype)) for name, module in variants}
            late.append(run_case(case, moved, args, LATE_RATIOS, Turns()))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            skipped.append(asdict(case) | {"what": "insert_layer", "reason": reason.removeprefix("RuntimeError: ")})
        write()
    ratios = (*RATIOS, *([CONTROL] if args.control else []))
    turns: dict[Case, Turns] = {}
    failed: set[Case] = set()
    for (device, model, size, dtype), number in product(shapes, range(args.builds)):
        models: dict[str, nn.Module] = {}
        for batch, with_compile, step in product(sorted(args.batches), compile_modes, args.steps):
            case = Case(device, model, size, dtype, batch, with_compile, step)
            bar.set_postfix_str(" ".join(str(value) for value in asdict(case).values()))
            if case in failed:
                bar.update()
                continue
            try:
                if time.time() - started > 60 * args.max_minutes:
                    raise RuntimeError(f"not started: --max-minutes {args.max_minutes} are over")
                if not models:
                    built = build(model, size, args.registers, number, args.control).items()
                    models = {name: module.to(device, getattr(torch, dtype)) for name, module in built}
                taken = turns.setdefault(case, Turns())
                results[case] = run_case(case, models, args, ratios, taken, results.get(case))
            # torch.compile fails in many ways; whatever stops a case is written down beside it.
            except Exception as error:
                failed.add(case)
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0].removeprefix("RuntimeError: ")
                skipped.append(asdict(case) | ({"from_build": number} if number else {}) | {"reason": reason})
            write()
            bar.update()
        del models
        gc.collect()
    bar.close()
    return report


def summary(report: dict[str, Any]) -> str:
    """The report as a Markdown table, a line a case."""
    heads = [*Case.__dataclass_fields__, "base ms", "adapter / base", "adapter / native", "again / native"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for result in report["results"]:
        ratios = [result["ratios"].get(key) for key in ("adapter/base", "adapter/native", "again/native")]
        cells = [str(result[key]) for key in Case.__dataclass_fields__]
        cells.append(f"{result['milliseconds']['base']['median']:.1f}")
        cells += [f"{r['median']:.3f} ({r['p10']:.3f}–{r['p90']:.3f})" if r else "" for r in ratios]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "insert_layer at half the depth / registers from block 0 on:", ""]
    for result in report["insert_layer"]:
        ratio = result["ratios"]["half/start"]
        peaks = [result["bytes"][name]["activation_peak"] for name in ("half", "start")]
        memory = "not seen" if None in peaks else f"{peaks[0] / peaks[1]:.3f}"
        case = " ".join(str(result[key]) for key in Case.__dataclass_fields__)
        lines.append(f"* {case}: time {ratio['median']:.3f} ({ratio['p10']:.3f}–{ratio['p90']:.3f}), memory {memory}")
    failed = [target for target in report["targets"] if not target["passed"]]
    lines.append(f"\n{len(report['targets']) - len(failed)} of {len(report['targets'])} targets reached.")
    lines += [f"missed: {target}" for target in failed]
    lines += [f"skipped: {case}" for case in report["skipped"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(summary(main()) + "\n")
