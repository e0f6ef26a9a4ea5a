"""Registers without training, fitted to a model and written into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...neurons import fit_test_time_registers
from ...training.saving import ADAPTER_FILES, RESULTS_NAME, RUN_CONFIG, save_adapter
from ...tuner.card_text import named
from ...utils.hub import MANIFEST_NAME
from ...utils.staging import check_apart, check_target, write_text
from .inputs import choose_device, load_base, load_images, load_processor
from .launched import is_main_process, num_processes, own_device
from .open_clip_models import is_open_clip

__all__ = ["FitArguments", "fitted_to", "how_to_load", "run_fit", "write_skipped"]

_SKIPPED = "skipped.txt"
#: Files that a training leaves beside its adapter.
_TRAINED = (MANIFEST_NAME, RESULTS_NAME, RUN_CONFIG)


@dataclass(frozen=True)
class FitArguments:
    """What to fit; see :func:`register_adapter.fit_test_time_registers` for all but these.

    Attributes:
        model: Name or folder of a model of transformers, or a word for what is packaged, such as ``"grown"``.
        images: Folder of images; ``"scenes"`` for images that the package draws.
        output_dir: Folder for the adapter.
        device: Where to run; default: a GPU if there is one.
    """

    model: str
    images: str
    output_dir: str
    num_registers: int = 1
    remove: str = "zero"
    attention_bias: bool = False
    gate: float | None = None
    rule: str = "auto"
    threshold: float | None = None
    top_block: int | None = None
    num_neurons: int | None = None
    image_sizes: Sequence[int] = ()
    max_images: int | None = None
    batch_size: int | None = None
    device: str | None = None
    strict: bool = False
    progress: bool = True


def run_fit(args: FitArguments) -> tuple[dict[int, list[int]], dict[str, Any]]:
    """Fit, and save the adapter.

    The processes of ``accelerate launch -m register_adapter fit`` share the images, and the main one writes.

    Returns:
        Block to its register neurons, and how they were found.

    Raises:
        NoArtifactsError: Nothing is to be done; nothing was written.
        ValueError, OSError, RegisterAdapterError: As for loading, and for the fit.
    """
    _check_output(args)
    images = load_images(args.images, args.max_images)
    shared = num_processes() > 1
    model = load_base(args.model).to(own_device(args.device) if shared else choose_device(args.device))
    fitted = fit_test_time_registers(
        model,
        images,
        image_processor=load_processor(args.model),
        num_registers=args.num_registers,
        remove=args.remove,
        attention_bias=args.attention_bias,
        gate=args.gate,
        rule=args.rule,
        threshold=args.threshold,
        top_block=args.top_block,
        num_neurons=args.num_neurons,
        image_sizes=args.image_sizes or None,
        max_images=args.max_images,
        batch_size=args.batch_size,
        strict=args.strict,
        progress=args.progress,
        shared=shared,
    )
    if is_main_process():
        save_adapter(fitted, Path(args.output_dir), {"training_data": fitted_to(args.images)})
    config = fitted.peft_config["default"]
    return config.register_neurons, config.test_time_fit


def _check_output(args: FitArguments) -> None:
    """The adapter can be written, beside no model and over nothing that was trained."""
    check_target(args.output_dir, files=(*ADAPTER_FILES, _SKIPPED))
    check_apart(args.output_dir, args.model.removeprefix("local-dir:"), args.images)
    trained = [name for name in _TRAINED if Path(args.output_dir, name).exists()]
    if trained:
        raise ValueError(
            f"{args.output_dir} holds a training run ({', '.join(trained)}), whose adapter the fitted one would "
            "replace; name another folder with --out"
        )


def fitted_to(images: str) -> str:
    """What the card of a fitted adapter says in the place of training data."""
    return f"{named(images)}: what the registers were fitted to, without training"


def how_to_load(model: str, output_dir: str) -> str:
    """A sentence that says how what :func:`run_fit` has saved is loaded, by the kind of model."""
    if is_open_clip(model):
        return (
            "load it with `import register_adapter, open_clip`, base, _, transform = open_clip.create_model_and_"
            f"transforms({model!r}, require_pretrained=True) and PeftModel.from_pretrained(base, {output_dir!r})"
        )
    return (
        f"load it, base and all, with AutoPeftModel.from_pretrained({output_dir!r}) after `import register_adapter`, "
        "or onto a base with PeftModel.from_pretrained(base, ...)"
    )


def write_skipped(lines: Sequence[str], output_dir: str) -> str:
    """Write which images were left out, a line for each, into ``skipped.txt``; no file if there are none.

    Returns:
        The path of the file.
    """
    path = Path(output_dir) / _SKIPPED
    if lines:
        write_text(path, "".join(f"{line}\n" for line in lines))
    else:
        path.unlink(missing_ok=True)
    return str(path)
