"""What ``accelerate launch -m register_adapter.train`` runs: flags, the model and its registers, the run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import nn
from transformers import HfArgumentParser

from ..data.datasets import DataArguments, ProcessedDataset, load_data, load_image_processor
from ..errors import RegisterAdapterError
from ..neurons import fit_test_time_registers, start_from
from ..tuner.layer import find_register_layer
from ..tuner.peft_model import RegisterPeftModel
from .arguments import TrainArguments
from .objectives import OBJECTIVES, AnnealedNeurons, Objective
from .trainer import check_output_dir, train, use_cpu

__all__ = ["ModelArguments", "main"]

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which model gets registers, and which.

    Raises:
        ValueError: ``num_registers`` is below 1.
    """

    model_name_or_path: str = field(metadata={"help": "Model on the Hub, or its folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    image_processor_name: str | None = field(default=None, metadata={"help": "Image processor, if not the model's."})
    objective: str = field(
        default="classification", metadata={"help": "What to train on.", "choices": sorted(OBJECTIVES)}
    )
    num_registers: int = field(default=4, metadata={"help": "Number of registers."})
    init: Literal["normal", "zeros", "cls", "test_time"] = field(
        default="normal",
        metadata={"help": "Their initial values; test_time finds register neurons on the training pictures first."},
    )
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of those."})
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Adapter to go on from, such as a fitted one: folder, or name on the Hub."}
    )
    neurons: Literal["keep", "drop", "anneal"] = field(
        default="keep",
        metadata={"help": "Register neurons of that adapter: train their strengths, drop them, or let them fade away."},
    )

    def __post_init__(self) -> None:
        if self.adapter_name_or_path and self.init != "normal":
            raise ValueError(f"--adapter_name_or_path brings initial values along; leave out --init {self.init}")
        if self.neurons != "keep" and not (self.adapter_name_or_path or self.init == "test_time"):
            raise ValueError(f"--neurons {self.neurons} needs --adapter_name_or_path or --init test_time")
        if self.num_registers < 1:
            raise ValueError(f"num_registers must be at least 1, got {self.num_registers}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the command line, train, and return the results that are written to ``results.json``.

    Args:
        argv: The arguments; those of the process by default.

    Raises:
        SystemExit: An argument, the data or the model is unfit; the message on the standard error says why.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TrainArguments),
        prog="register_adapter.train",
        description="Train register tokens on a frozen vision transformer. A token for the Hub is taken from HF_TOKEN "
        "or from `hf auth login`, never from the command line.",
        allow_abbrev=False,
    )
    for objective in OBJECTIVES.values():
        objective.add_arguments(parser.add_argument_group(f"objective {objective.name}"))
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
        model_args, data_args, args, *namespaces = parsed
        # Names only: a value may be a token.
        unknown = [word.partition("=")[0] for word in rest if word.startswith("-")] or ["a value without a flag"]
        if rest:
            raise ValueError(f"unrecognised arguments: {', '.join(unknown)}")
        if args.output_dir is None:
            raise ValueError("--output_dir is required")
        check_output_dir(args)
    except (TypeError, ValueError) as error:
        parser.error(str(error))

    state = PartialState(cpu=use_cpu(args))
    with _messages(state.is_main_process):
        try:
            return _train(model_args, data_args, args, namespaces[0])
        except (RegisterAdapterError, FloatingPointError, ValueError, OSError) as error:
            # A mistake of the user's, not of the program's: no traceback.
            if state.is_main_process:
                logger.error("%s", error)
            sys.exit(1)


@contextmanager
def _messages(is_main_process: bool) -> Iterator[None]:
    """Show the package's own messages on the standard error, from the main process alone."""
    package, handler = logging.getLogger("register_adapter"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO if is_main_process else logging.CRITICAL)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def _train(model_args: ModelArguments, data_args: DataArguments, args: TrainArguments, flags: Any) -> dict[str, Any]:
    set_seed(args.seed)
    source, revision = model_args.image_processor_name or model_args.model_name_or_path, model_args.model_revision
    image_processor = load_image_processor(
        source, **({} if model_args.image_processor_name else {"revision": revision})
    )
    data = load_data(data_args, args.seed, max(1, args.dataloader_num_workers))
    objective = OBJECTIVES[model_args.objective].from_arguments(flags, data.labels)
    base = objective.load_base(model_args.model_name_or_path, revision=revision)
    pictures = ProcessedDataset(data.train, image_processor)
    model = _wrap(model_args, objective, base, pictures)
    if model_args.neurons == "anneal":
        objective = AnnealedNeurons(objective)
    return train(
        model,
        objective,
        pictures,
        args,
        ProcessedDataset(data.validation, image_processor),
        image_processor=image_processor,
        training_data=data.name,
        evaluation_data=data.validation_name,
        details={"model": model_args.model_name_or_path, "num_registers": _registers_of(model)}
        | {"data": data.name, "skipped": data.skipped},
    )


def _wrap(args: ModelArguments, objective: Objective, base: nn.Module, pictures: ProcessedDataset) -> RegisterPeftModel:
    """New registers, or those of an adapter, or fitted ones."""
    if args.adapter_name_or_path is None and args.init != "test_time":
        return objective.wrap(base, num_registers=args.num_registers, init=args.init, init_std=args.init_std)
    device = PartialState().device
    base.to(device)
    if args.adapter_name_or_path is not None:
        source = RegisterPeftModel.from_pretrained(base, args.adapter_name_or_path)
    else:
        source = fit_test_time_registers(base, _Pictures(pictures), num_registers=args.num_registers)
    few, dropped = range(min(len(pictures), 64)), args.neurons == "drop"
    batches = [torch.stack([pictures[index]["pixel_values"] for index in few]).to(device)] if dropped else []
    start = start_from(source, args.neurons, batches)
    source.unload()
    model = objective.wrap(base, **start.options)
    layer = find_register_layer(model)
    assert layer is not None
    start.fill(layer.tokens(str(model.active_adapter)))
    return model


class _Pictures:
    """Pixel values alone, in batches, as a fit takes them."""

    def __init__(self, pictures: ProcessedDataset, batch_size: int = 32) -> None:
        self.pictures, self.batch_size = pictures, batch_size

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.pictures), self.batch_size):
            items = range(start, min(start + self.batch_size, len(self.pictures)))
            yield torch.stack([self.pictures[index]["pixel_values"] for index in items])


def _registers_of(model: RegisterPeftModel) -> int:
    return int(model.peft_config[str(model.active_adapter)].num_registers)
