"""What ``accelerate launch -m register_adapter.train`` runs: flags, the model and its registers, the run."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, NoReturn

from accelerate import PartialState
from accelerate.utils import set_seed
from PIL import Image
from torch import nn
from transformers import HfArgumentParser

from ..data.datasets import DataArguments, ProcessedDataset, load_data
from ..data.processing import check_fits, pixels_alone, process_image
from ..data.processors import load_image_processor
from ..data.stream_loading import load_stream
from ..data.streaming import StreamedDataset
from ..errors import Farewell, RegisterAdapterError
from ..towers.tower import find_towers
from ..utils.files import strict_json
from ..utils.progress import disable_progress_bars
from ..utils.shipped import full_name
from ..utils.staging import check_apart, check_target, check_writable, real_path
from ..utils.text import printable, shortened, without_password
from .arguments import TrainArguments
from .bases import load_base
from .callbacks import AnnealNeurons
from .flags import ModelArguments, config_words, did_you_mean, render_config
from .interruption import Interrupted, Interruption
from .last_words import farewell, is_of_another_process, of_another_process, summarise, tell_fault
from .objectives import OBJECTIVES, ClassificationObjective
from .objectives.flags import (
    add_objective_flags,
    added_terms,
    early_value,
    make_objective,
    needed_keys,
    objective_of,
    takers_of,
)
from .run_lock import folder_lock_of_run
from .saving import check_output_dir, check_push
from .setup import check_streamed, use_cpu
from .starting import registers_of, start
from .trainer import train

__all__ = ["ModelArguments", "main"]

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, prog: str = "register_adapter.train") -> dict[str, Any]:
    """Parse the command line, train, and return the results that are written to ``results.json``.

    Args:
        argv: The arguments; those of the process by default.
        prog: Name of the program in its help.

    Raises:
        SystemExit: An argument, the data or the model is unfit; the message on the standard error says why.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    objective = objective_of(argv)
    parser = _make_parser(prog, objective, added_terms(argv, objective))
    model_args, data_args, args, flags = _parse(parser, argv)
    if args.quiet:
        disable_progress_bars()
    state = PartialState(cpu=use_cpu(args))
    with _messages(state.is_main_process, args.quiet), Interruption() as interruption, ExitStack() as held:
        try:
            labelled = "labels" in needed_keys(model_args.objective, flags)
            classes = (data_args.train_dir, data_args.validation_dir) if labelled else ()
            for folder in (str(args.output_dir), *([] if args.target_store is None else [args.target_store])):
                check_target(folder, *classes)
            held.enter_context(folder_lock_of_run(str(args.output_dir), state))
            check_output_dir(args)
            check_push(args)
            # Before data and model are loaded, which may take hours.
            check_writable(str(args.output_dir))
        except (ValueError, OSError) as error:
            if state.is_main_process:
                parser.error(str(error))
            tell_fault(str(error), state)
            sys.exit(2)
        try:
            results = _train(model_args, data_args, args, flags, interruption)
        except (RegisterAdapterError, FloatingPointError, ValueError, OSError) as error:
            # A mistake of the user's, not of the program's: no traceback.
            tell_fault(shortened(without_password(str(error))), state)
            sys.exit(1)
        except RuntimeError as error:
            if state.num_processes == 1 or not is_of_another_process(error):
                raise
            tell_fault(of_another_process(error, args, prog, argv), state)
            sys.exit(1)
        except KeyboardInterrupt as error:
            stop = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
            if state.is_main_process:
                logger.error("%s", farewell(stop, args, prog, argv))
            # The traceback holds the loaders, whose workers would be waited for at the process's end.
            stop.with_traceback(None)
            raise Farewell(stop.exit_code) from None
    state.destroy_process_group()
    if state.is_main_process:
        said = strict_json(results, indent=1) if flags.json else summarise(results, str(args.output_dir))
        if sys.stdout is not None and (flags.json or not args.quiet):  # None: closed by whoever started the run
            sys.stdout.write(said + "\n")
            sys.stdout.flush()
    return results


class _Parser(HfArgumentParser):  # type: ignore[misc, unused-ignore]
    def error(self, message: str) -> NoReturn:
        """What is wrong, without the usage: it has more lines than a screen."""
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")
        raise AssertionError  # exit() does not return


def _make_parser(
    prog: str, objective: str = ClassificationObjective.name, added: Sequence[str] = ()
) -> HfArgumentParser:
    """The parser of all flags; it accepts underscores and hyphens, and shows hyphens."""
    parser = _Parser(
        (ModelArguments, DataArguments, TrainArguments),
        prog=prog,
        description="Train register tokens on a frozen vision transformer. The flags of --objective "
        f"{objective} come last; `--objective NAME --help` lists another's. A token for the Hub is taken from HF_TOKEN "
        "or from `hf auth login`, never from the command line.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="Print the results as JSON, and nothing else.")
    parser.add_argument("--config", help="YAML file with flags; those on the command line win.")
    add_objective_flags(parser, objective, added)
    for action in parser._actions:
        if action.dest == "objective":
            action.choices = sorted(OBJECTIVES)  # a user's own among them
        shown = [option for option in action.option_strings if "_" not in option]
        # The parser has its own table of what it accepts; these are for help and messages.
        action.option_strings = shown or action.option_strings
    return parser


def _parse(
    parser: HfArgumentParser, argv: Sequence[str]
) -> tuple[ModelArguments, DataArguments, TrainArguments, Namespace]:
    """The arguments, checked as far as they can be before anything is loaded.

    Raises:
        SystemExit: One of them is unfit.
    """
    try:
        path, first = early_value(argv, "config"), list[str]()
        if path is not None:
            first = config_words(path, parser, _advice)
        *parsed, rest = parser.parse_args_into_dataclasses([*first, *argv], True, look_for_args_file=False)
        # Names only: a value may be a token.
        unknown = [word.partition("=")[0] for word in rest if word.startswith("-")]
        if rest:
            listed = ", ".join(name + _advice(name, parser) for name in unknown) or "a value without a flag"
            raise ValueError(f"unrecognised arguments: {listed}")
        model_args, data_args, args, flags = parsed
        if args.output_dir is None:
            raise ValueError("--output-dir is required")
        model_args.model_name_or_path = full_name(model_args.model_name_or_path)
        read = [model_args.model_name_or_path, data_args.train_dir, data_args.validation_dir]
        check_apart(args.output_dir, *read)
        _check_store(args.target_store, [*read, args.output_dir])
        if data_args.streaming:
            check_streamed(args)
    except (TypeError, ValueError, OSError) as error:
        parser.error(str(error))
    return model_args, data_args, args, flags


def _advice(name: str, parser: HfArgumentParser) -> str:
    """Which objectives have the flag, or what it may be a misspelling of."""
    takers = takers_of(name)
    return f" (a flag of --objective {' or '.join(takers)})" if takers else did_you_mean(name, parser)


def _check_store(store: str | None, others: Sequence[str | None]) -> None:
    """Refuse a store of targets where the run reads something else, or writes it."""
    if store is None:
        return
    place = real_path(store)
    for name in filter(None, others):
        folder = real_path(name)
        if folder == place or (name != others[-1] and folder in place.parents):
            raise ValueError(f"--target-store {store} is in {name}, which holds something else; name another folder")


class _Formatter(logging.Formatter):
    """What others chose, such as the name of a folder, does not control a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text in which every character shows."""
        return printable(super().format(record), keep="\n")


@contextmanager
def _messages(is_main_process: bool, quiet: bool) -> Iterator[None]:
    """Show the package's own messages on the standard error; ``quiet`` keeps warnings.

    From the main process all, from others what they alone know: records with an attribute ``of_one_process``.
    """
    package, handler = logging.getLogger("register_adapter"), logging.StreamHandler()
    handler.addFilter(lambda record: is_main_process or hasattr(record, "of_one_process"))
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.WARNING if quiet or not is_main_process else logging.INFO)
    try:
        with warnings.catch_warnings():
            # PEFT reads an attribute that transformers has renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def _train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainArguments,
    flags: Namespace,
    interruption: Interruption,
) -> dict[str, Any]:
    set_seed(args.seed)
    source, revision = model_args.image_processor_name or model_args.model_name_or_path, model_args.model_revision
    image_processor = load_image_processor(
        source, **({} if model_args.image_processor_name else {"revision": revision})
    )
    workers, keys = max(1, args.dataloader_num_workers), needed_keys(model_args.objective, flags)
    shown, labelled, texts = not args.quiet, "labels" in keys, "text" in keys
    if data_args.streaming:
        data = load_stream(data_args, workers, progress=shown, labelled=labelled, texts=texts)
    else:
        data = load_data(data_args, args.seed, workers, progress=shown, labelled=labelled, texts=texts)
    objective = make_objective(model_args.objective, Namespace(**vars(flags), seed=args.seed), data.labels)
    base = load_base(objective, model_args.model_name_or_path, revision=revision)
    _check_processor(image_processor, base)
    augmentation = data_args.make_augmentation(args.seed)
    train_data: Any
    if data_args.streaming:
        train_data = StreamedDataset(
            *(data.train, image_processor, augmentation),
            seed=args.seed,
            shuffle_buffer=data_args.shuffle_buffer,
            strict=data_args.strict,
            name=data.name,
        )
        images = train_data.head
    else:
        train_data = ProcessedDataset(data.train, image_processor, augmentation)
        images = ProcessedDataset(data.train, image_processor)
    model = start(model_args, objective, base, images, progress=not args.quiet, seed=args.seed)
    return train(
        model,
        objective,
        train_data,
        args,
        ProcessedDataset(data.validation, image_processor),
        image_processor=image_processor,
        training_data=data.name,
        evaluation_data=data.validation_name,
        details={"model": model_args.model_name_or_path, "num_registers": sum(registers_of(model).values())}
        | {"adapter": model_args.adapter_name_or_path}
        | {"data": data.name, "skipped": data.skipped, "augmentation": str(augmentation) if augmentation else None},
        run_config=render_config({**asdict(model_args), **asdict(data_args), **asdict(args), **vars(flags)}),
        interruption=interruption,
        callbacks=[AnnealNeurons()] if model_args.neurons == "anneal" else [],
    )


def _check_processor(processor: Any, base: nn.Module) -> None:
    """Refuse a processor of another model before anything is computed."""
    tower = next(find_towers(base), None)
    if tower is not None:
        blank = Image.new("RGB", (256, 256), "grey")
        made = process_image(processor, blank, "a grey image")
        check_fits(made, tower.module, processor)
        pixels_alone(made, processor)
