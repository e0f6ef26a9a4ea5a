"""The demo: train registers on a model with artifacts, save and reload them, and measure before and after.

Without arguments it runs on what the package ships: a small ViT with planted artifacts, whose clean twin is known, and
procedural scenes. With ``model`` and ``images`` it does the same on a user's own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...artifacts.norms import patch_norms
from ...data.datasets import DataArguments, ProcessedDataset, load_data
from ...data.images import load_image
from ...data.processors import load_image_processor
from ...errors import NoArtifactsError
from ...evaluation.measure import Measured, Reference, measure_model
from ...neurons import fit_test_time_registers, start_from
from ...testbed import LABELS, SceneDataset, load_planted_vit, load_vit, random_registers
from ...testbed import load_image_processor as load_scene_processor
from ...training import TrainArguments, load_base, train, wrap
from ...training.objectives import ClassificationObjective
from ...training.run_lock import folder_lock
from ...training.saving import save_adapter
from ...tuner.layer import require_register_layer
from ...tuner.peft_model import RegisterPeftModel
from ...utils.shipped import full_name
from ...utils.staging import check_target, staged, write_text
from ...viz import Maps, plot_before_after, read_maps
from .fit import fitted_to
from .reload import logits_in_fresh_process
from .spread import combine_runs

__all__ = ["DemoArguments", "run_demo"]

#: Held-out scenes have other seeds and other photographs than those that registers are trained on.
_TRAIN_SEED, _TEST_SEED = 1, 10_001
_SHOWN = 4
#: Images that a fit is made on, and what it needs.
_FIT_IMAGES, _FEWEST = 192, 3


@dataclass(frozen=True)
class DemoArguments:
    """What the demo runs on.

    Attributes:
        output_dir: Folder for the adapter, the figure and ``demo.json``.
        model: Name or folder of a vision transformer with an image classification class; default: the packaged one.
        images: Folder of images with one sub-folder per class; goes with ``model``.
        num_registers: Number of registers.
        max_train_steps: Optimiser steps.
        batch_size: Images per step.
        learning_rate: Peak learning rate of AdamW, cosine schedule.
        num_eval_images: Held-out images to measure on, at most.
        seed: Seed of everything random.
        seeds: Number of runs, each with a seed one higher than the last one's.
        progress: Show bars.

    Raises:
        ValueError: ``seeds`` is below 1, the rate is none, one of ``model`` and ``images`` is missing, or there are too
            few images to fit.
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
    seeds: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")
        if (self.model is None) != (self.images is None):
            missing = "images" if self.images is None else "model"
            raise ValueError(f"--model and --images go together; --{missing} is missing")
        # Said by the training and the fit otherwise, after other arms.
        TrainArguments(learning_rate=self.learning_rate)
        if self.model is None and self.max_train_steps * self.batch_size < _FEWEST:
            raise ValueError(
                f"--max-train-steps {self.max_train_steps} and --batch-size {self.batch_size} are "
                f"{self.max_train_steps * self.batch_size} images, and a fit needs {_FEWEST}"
            )


@dataclass
class _Setting:
    """A base model on disk, images to train and to measure on, and what is known about them."""

    source: str
    before: str
    twin: Any
    objective: ClassificationObjective
    processor: Any
    train: Any
    test: Any
    data_name: str
    test_name: str | None
    seed: int
    #: What a head learns without registers, where the head is trained at all.
    head: dict[str, torch.Tensor] | None = None

    def load(self, trained_head: bool = True) -> Any:
        """A fresh copy of the base: with the head that was trained without registers, or as a training begins."""
        torch.manual_seed(self.seed)  # a new head is the same in every arm
        base = load_base(self.objective, self.source).eval()
        if trained_head and self.head is not None:
            base.get_submodule(self.objective.head).load_state_dict(self.head)
        return base


def _packaged(args: DemoArguments) -> _Setting:
    # Saved as any base is, so that the adapter can be loaded by name afterwards.
    folder = Path(args.output_dir, "planted_model")
    with staged(folder, last=["config.json"]) as scratch:
        load_planted_vit().model.save_pretrained(scratch)
        load_scene_processor().save_pretrained(scratch)
    return _Setting(
        str(folder),
        "planted artifacts",
        load_vit(),
        ClassificationObjective(LABELS, freeze_head=True),
        load_scene_processor(),
        SceneDataset(args.max_train_steps * args.batch_size, seed=_TRAIN_SEED + args.seed),
        SceneDataset(args.num_eval_images, seed=_TEST_SEED, split="test"),
        "procedural scenes (register_adapter.testbed.scenes)",
        "procedural scenes (register_adapter.testbed.scenes), test split",
        args.seed,
    )


def _own(args: DemoArguments) -> _Setting:
    assert args.model is not None
    data = load_data(
        DataArguments(train_dir=args.images, max_eval_samples=args.num_eval_images), args.seed, progress=args.progress
    )
    return _Setting(
        full_name(args.model),
        "your model",
        None,
        ClassificationObjective(data.labels),
        load_image_processor(full_name(args.model)),
        data.train,
        data.validation,
        data.name,
        data.validation_name,
        args.seed,
    )


class _Table:
    """Measures one arm after the other on the same held-out images."""

    def __init__(self, setting: _Setting, base: nn.Module, limit: int) -> None:
        test = ProcessedDataset(setting.test, setting.processor)
        items = [test[index] for index in range(min(len(test), limit))]
        pixels = torch.stack([item["pixel_values"] for item in items])
        self.batches = [pixels[start : start + 32] for start in range(0, len(pixels), 32)]
        self.labels = torch.tensor([item["labels"] for item in items])
        # The figure shows the first images with an outlier in the base, and the first ones if there are too few.
        norms = patch_norms(base, self.batches[:1])
        order = (norms <= 3 * norms.median()).all(1).long().argsort(stable=True)[:_SHOWN].sort().values
        self.shown = self.batches[0][order]
        self.images = [load_image(setting.test[index]["image"]) for index in order.tolist()]
        #: Arm to its line.
        self.rows: dict[str, Measured] = {}
        self.maps: list[Maps] = []
        self._reference: Reference | None = None

    def add(self, arm: str, name: str, model: nn.Module, shown: str | None = None) -> None:
        """Measure an arm; the first one is what others are compared with. ``shown`` names it in the figure."""
        row, outputs = measure_model(name, model, self.batches, self.labels, self._reference)
        self._reference = self._reference or outputs
        self.rows[arm] = row
        if shown:
            self.maps.append(read_maps(shown, model, self.shown))


def run_demo(args: DemoArguments) -> dict[str, Any]:
    """Run the demo, with one seed after the other.

    Arms: the clean twin (where it is known), the model as it is, the model with random untrained registers (the
    control: tokens alone may silence a fragile artifact), with trained registers (loaded again in a fresh process),
    with test-time registers (no training), and with both: test-time registers and the strengths of their neurons,
    trained as the others were. A head for a user's classes is trained in every arm, in the same way: with the registers
    where these are trained, otherwise without any.

    Returns:
        What ``demo.json`` holds: ``rows`` (one a line of the table), ``eval_images`` (how many were measured),
        ``adapter_bytes``, ``reload_identical``, the training's results, how register neurons were found (``None`` if
        there was nothing to repair), the arguments. With several seeds, ``rows`` have means and ``ranges``, and
        ``runs`` holds what each seed gave.

    Raises:
        RuntimeError: The reloaded adapter does not give the outputs of the trained model.
        FolderInUseError: Another run writes into the folder.
    """
    check_target(args.output_dir, args.images, files=("before_after.png", "demo.json"))
    out = Path(args.output_dir)
    with folder_lock(out):
        if args.seeds == 1:
            return _run(args)
        seeds = range(args.seed, args.seed + args.seeds)
        folders = {seed: str(out / f"seed-{seed}") for seed in seeds}
        runs = [_run(replace(args, seed=seed, seeds=1, output_dir=folders[seed])) for seed in seeds]
        report = combine_runs(runs) | {"arguments": _arguments(args)}
        report["written"] = [*(f"seed-{seed}/" for seed in seeds), "demo.json"]
        write_text(out / "demo.json", json.dumps(report, indent=2) + "\n")
    return report


def _arguments(args: DemoArguments) -> dict[str, Any]:
    arguments = asdict(args)
    del arguments["progress"]
    return arguments


def _run(args: DemoArguments) -> dict[str, Any]:
    """One seed."""
    out = Path(args.output_dir)
    torch.manual_seed(args.seed)
    setting = _own(args) if args.model else _packaged(args)
    if not setting.objective.freeze_head:
        setting.head = _train_head(args, setting)
    base = setting.load()
    table = _Table(setting, base, args.num_eval_images)
    _add_untrained(args, setting, table, base)
    results, identical = _add_trained(args, setting, table, out / "adapter")
    fit = _add_test_time(args, setting, table, out)
    report = {
        "rows": [{"arm": arm, **asdict(row)} for arm, row in table.rows.items()],
        "eval_images": len(table.labels),
        "trains_head": setting.head is not None,
        "adapter_bytes": (out / "adapter" / "adapter_model.safetensors").stat().st_size,
        "reload_identical": identical,
        "test_time_fit": fit,
        "arguments": _arguments(args),
        "written": ["adapter/", *(["test_time/", "both/"] if fit else []), "before_after.png", "demo.json"],
        "training": {key: results[key] for key in ("metrics", "seconds", "images_per_second", "versions", "hardware")},
    }
    with staged(out, last=["demo.json"]) as folder:
        plot_before_after(table.images, table.maps, folder / "before_after.png")
        (folder / "demo.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report


def _add_untrained(args: DemoArguments, setting: _Setting, table: _Table, base: nn.Module) -> None:
    """The arms in which nothing is trained: the clean twin, the model as it is, and with random registers."""
    if setting.twin is not None:
        table.add("twin", "clean twin", setting.twin, shown="clean twin")
    table.add("before", setting.before, base, shown="before")
    count = args.num_registers
    with random_registers(base, count, seed=args.seed) as model:
        table.add("control", f"+ {count} random registers (control)", model)


def _train_head(args: DemoArguments, setting: _Setting) -> dict[str, torch.Tensor]:
    """The head as it is learned without registers, in the same number of steps; nothing is saved."""
    model = wrap(setting.load(), setting.objective, num_registers=args.num_registers)
    with require_register_layer(model).set_aside():
        _train(args, setting, model, None)
    head: Any = model.get_base_model().get_submodule(setting.objective.head)
    return {name: value.detach().cpu() for name, value in head.modules_to_save["default"].state_dict().items()}


def _add_trained(args: DemoArguments, setting: _Setting, table: _Table, folder: Path) -> tuple[dict[str, Any], bool]:
    """The arm with trained registers; the results of the training, and whether the saved adapter is the trained one.

    Raises:
        RuntimeError: The adapter, loaded in a fresh process, does not give the outputs of the trained model.
    """
    base = setting.load(trained_head=False)
    torch.manual_seed(args.seed)
    model = wrap(base, setting.objective, num_registers=args.num_registers)
    results = _train(args, setting, model, folder)
    model = model.cpu().eval()
    logits = logits_in_fresh_process(folder, table.batches[0])
    with torch.no_grad():
        identical = torch.equal(logits, model(pixel_values=table.batches[0]).logits)
    if not identical:
        raise RuntimeError("the saved adapter, loaded in a fresh process, does not give the trained outputs")
    table.add("trained", f"+ {args.num_registers} trained registers", model, shown="trained")
    return results, identical


def _add_test_time(args: DemoArguments, setting: _Setting, table: _Table, out: Path) -> dict[str, Any] | None:
    """The arms with register neurons, and how these were found; ``None`` if there are no outliers to repair."""
    base = setting.load()
    images = ProcessedDataset(setting.train, setting.processor)
    some = torch.stack([images[index]["pixel_values"] for index in range(min(len(images), _FIT_IMAGES))])
    try:
        fitted = fit_test_time_registers(base, some, progress=args.progress)
    except NoArtifactsError:
        return None
    save_adapter(fitted, out / "test_time", {"training_data": fitted_to(setting.data_name)})
    table.add("test_time", "+ 1 test-time register", fitted.eval(), shown="test-time")
    fit: dict[str, Any] = fitted.peft_config["default"].test_time_fit
    start = start_from(fitted)
    both = wrap(setting.load(trained_head=False), setting.objective, **start.options)
    layer = require_register_layer(both)
    start.fill(layer.tokens("default"))
    _train(args, setting, both, out / "both")
    table.add("both", "+ both: test-time, then trained", both.cpu().eval(), shown="both")
    return fit


def _train(args: DemoArguments, setting: _Setting, model: RegisterPeftModel, folder: Path | None) -> dict[str, Any]:
    return train(
        model,
        setting.objective,
        setting.train,
        TrainArguments(
            output_dir=str(folder) if folder else None,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            num_warmup_steps=min(10, args.max_train_steps // 5),
            max_train_steps=args.max_train_steps,
            seed=args.seed,
            use_cpu=not torch.cuda.is_available(),
            overwrite_output_dir=True,
            quiet=not args.progress,
        ),
        setting.test if folder else None,  # for the card of what is saved
        image_processor=setting.processor,
        training_data=setting.data_name,
        evaluation_data=setting.test_name,
    )
