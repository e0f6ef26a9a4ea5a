"""The command ``register-adapter fit``: registers without training, written into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..neurons import fit_test_time_registers
from .inputs import load_base, load_pictures, load_processor

__all__ = ["FitArguments", "print_fit", "run_fit"]


@dataclass(frozen=True)
class FitArguments:
    """What to fit; see :func:`register_adapter.fit_test_time_registers` for all but the first three.

    Attributes:
        model: Name or folder of a model of transformers; ``"planted"`` or ``"clean"`` for the shipped ViT.
        images: Folder of pictures; ``"scenes"`` for made ones.
        output_dir: Folder for the adapter.
        device: Where to run; default: a GPU if there is one.
    """

    model: str
    images: str
    output_dir: str
    num_registers: int = 1
    remove: str = "zero"
    attention_bias: bool = False
    rule: str = "auto"
    threshold: float | None = None
    top_layer: int | None = None
    num_neurons: int | None = None
    image_sizes: Sequence[int] = ()
    max_images: int = 256
    batch_size: int | None = None
    device: str | None = None
    strict: bool = False


def run_fit(args: FitArguments) -> tuple[dict[int, list[int]], dict[str, Any]]:
    """Fit, and save the adapter.

    Returns:
        Block to its register neurons, and how they were found.

    Raises:
        NoArtifactsError: Nothing is to be done; nothing was written.
        ValueError, OSError, RegisterAdapterError: As for loading, and for the fit.
    """
    pictures = load_pictures(args.images, args.max_images)
    model = load_base(args.model).to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    fitted = fit_test_time_registers(
        model,
        pictures,
        image_processor=load_processor(args.model),
        num_registers=args.num_registers,
        remove=args.remove,
        attention_bias=args.attention_bias,
        rule=args.rule,
        threshold=args.threshold,
        top_layer=args.top_layer,
        num_neurons=args.num_neurons,
        image_sizes=args.image_sizes or None,
        max_images=args.max_images,
        batch_size=args.batch_size,
        strict=args.strict,
    )
    fitted.save_pretrained(args.output_dir)
    config = fitted.peft_config["default"]
    return config.register_neurons, config.test_time_fit


def print_fit(neurons: dict[int, list[int]], fit: dict[str, Any], output_dir: str) -> None:
    """Print what was found."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="outlier patches left, by number of register neurons (held-out pictures)")
    table.add_column("neurons", justify="right")
    table.add_column("outlier patches", justify="right")
    for number, share in sorted((int(number), share) for number, share in fit["curve"].items()):
        chosen = number == fit["num_neurons"]
        table.add_row(f"{number}{' *' if chosen else ''}", f"{share:.3%}", style="bold" if chosen else None)
    console.print(table)
    for block, units in neurons.items():
        console.print(f"Block {block}: hidden units {', '.join(map(str, units))}", markup=False)
    console.print(
        f"Outliers appear behind block {fit['top_layer']} (rule {fit['rule']}). {fit['reason']}", markup=False
    )
    console.print(
        "Share of the patch tokens beyond the line, behind that block; L2 norms, before the final LayerNorm.",
        style="dim",
    )
    console.print(
        f"Written to {output_dir}; load it, base and all, with AutoPeftModel.from_pretrained({output_dir!r}) after "
        "`import register_adapter`, or onto a base with PeftModel.from_pretrained(base, ...)",
        markup=False,
    )
