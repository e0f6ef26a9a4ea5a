"""The demo: train registers on a model with artifacts, save and reload them, and measure before and after.

Without arguments it runs on what the package ships: a small ViT with planted artifacts, whose clean twin is known, and
procedural scenes. With ``model`` and ``images`` it does the same on a user's own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .data import DataArguments, ProcessedDataset, load_data, load_image_processor
from .images import load_image
from .measure import Measured, Reference, measure
from .objectives import ClassificationObjective
from .reload import logits_in_fresh_process
from .testbed import LABELS, SceneDataset, load_planted_vit, load_vit, register_probe
from .testbed import load_image_processor as load_scene_processor
from .training import TrainArguments, train
from .viz import plot_before_after, read_maps

__all__ = ["DemoArguments", "run_demo"]

#: Held-out scenes have other seeds and other photographs than those that registers are trained on.
_TRAIN_SEED, _TEST_SEED = 1, 10_001
_SHOWN = 4


@dataclass(frozen=True)
class DemoArguments:
    """What the demo runs on.

    Attributes:
        output_dir: Folder for the adapter, the figure and ``demo.json``.
        model: Name or folder of a vision transformer with an image classification class; default: the shipped one.
        images: Folder with one sub-folder of pictures a class; goes with ``model``.
        num_registers: Number of registers.
        max_train_steps: Optimiser steps.
        batch_size: Pictures a step.
        learning_rate: Peak learning rate of AdamW, cosine schedule.
        num_eval_images: Held-out pictures to measure on, at most.
        seed: Seed of everything random.

    Raises:
        ValueError: One of ``model`` and ``images`` is given without the other.
    """

    output_dir: str = "demo"
    model: str | None = None
    images: str | None = None
    num_registers: int = 4
    max_train_steps: int = 150
    batch_size: int = 32
    learning_rate: float = 0.01
    num_eval_images: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.model is None) != (self.images is None):
            missing = "images" if self.images is None else "model"
            raise ValueError(f"--model and --images go together; --{missing} is missing")


@dataclass
class _Setting:
    """A base model on disk, pictures to train and to measure on, and what is known about them."""

    base: Any
    before: str
    twin: Any
    objective: ClassificationObjective
    processor: Any
    train: Any
    test: Any
    data_name: str


def _shipped(args: DemoArguments) -> _Setting:
    # Saved as any base is, so that the adapter can be loaded by name afterwards.
    folder = Path(args.output_dir, "planted_model")
    load_planted_vit().model.save_pretrained(folder)
    load_scene_processor().save_pretrained(folder)
    objective = ClassificationObjective(LABELS, freeze_head=True)
    return _Setting(
        objective.load_base(str(folder)).eval(),
        "planted artifacts",
        load_vit(),
        objective,
        load_scene_processor(),
        SceneDataset(args.max_train_steps * args.batch_size, seed=_TRAIN_SEED + args.seed),
        SceneDataset(args.num_eval_images, seed=_TEST_SEED, split="test"),
        "procedural scenes (register_adapter.testbed.scenes)",
    )


def _own(args: DemoArguments) -> _Setting:
    assert args.model is not None
    data = load_data(DataArguments(train_dir=args.images, max_eval_samples=args.num_eval_images), args.seed)
    objective = ClassificationObjective(data.labels)
    base = objective.load_base(args.model).eval()
    processor = load_image_processor(args.model)
    return _Setting(base, "your model", None, objective, processor, data.train, data.validation, data.name)


def run_demo(args: DemoArguments) -> dict[str, Any]:
    """Run the demo.

    Arms: the clean twin (where it is known), the model as it is, the model with random untrained registers (the
    control: tokens alone may silence a fragile artifact), and the model with trained registers, loaded again.

    Returns:
        What ``demo.json`` holds: ``rows`` (one a line of the table), ``adapter_bytes``, ``reload_identical``, the
        training's results, the arguments.

    Raises:
        RuntimeError: The reloaded adapter does not give the outputs of the trained model.
    """
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    setting = _own(args) if args.model else _shipped(args)
    test = ProcessedDataset(setting.test, setting.processor)
    items = [test[index] for index in range(min(len(test), args.num_eval_images))]
    pixels = torch.stack([item["pixel_values"] for item in items])
    batches = [pixels[start : start + 32] for start in range(0, len(pixels), 32)]
    labels = torch.tensor([item["labels"] for item in items])
    own_head = setting.twin is not None  # a user's new head knows nothing before it is trained
    rows: list[Measured] = []
    reference: Reference | None = None
    if setting.twin is not None:
        row, reference = measure("clean twin", setting.twin, batches, labels)
        rows.append(row)
    row, found = measure(setting.before, setting.base, batches, labels if own_head else None, reference)
    rows.append(row)
    reference = reference or found
    shown = batches[0][:_SHOWN]
    maps = [read_maps("clean twin", setting.twin, shown)] if setting.twin is not None else []
    maps.append(read_maps("before", setting.base, shown))
    with register_probe(setting.base, args.num_registers, seed=args.seed) as probed:
        name = f"+ {args.num_registers} random registers (control)"
        rows.append(measure(name, probed, batches, labels if own_head else None, reference)[0])

    model = setting.objective.wrap(setting.base, num_registers=args.num_registers)
    adapter = out / "adapter"
    results = train(
        model,
        setting.objective,
        setting.train,
        TrainArguments(
            output_dir=str(adapter),
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            num_warmup_steps=min(10, args.max_train_steps // 5),
            max_train_steps=args.max_train_steps,
            seed=args.seed,
            use_cpu=not torch.cuda.is_available(),
            overwrite_output_dir=True,
        ),
        image_processor=setting.processor,
        training_data=setting.data_name,
    )
    model = model.cpu().eval()
    logits = logits_in_fresh_process(adapter, batches[0])
    with torch.no_grad():
        identical = torch.equal(logits, model(pixel_values=batches[0]).logits)
    if not identical:
        raise RuntimeError(f"the adapter in {adapter}, loaded in a fresh process, does not give the trained outputs")
    name = f"+ {args.num_registers} trained registers"
    rows.append(measure(name, model, batches, labels, reference)[0])
    maps.append(read_maps("after", model, shown))
    pictures = [load_image(setting.test[index]["image"]) for index in range(len(shown))]
    plot_before_after(pictures, maps, out / "before_after.png")
    report = {
        "rows": [asdict(row) for row in rows],
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "reload_identical": identical,
        "arguments": asdict(args),
        "training": {key: results[key] for key in ("metrics", "seconds", "images_per_second", "versions", "hardware")},
    }
    (out / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    return report
