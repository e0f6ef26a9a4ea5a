"""What a run says at its end: what came of it, or how to go on."""

from __future__ import annotations

import logging
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import distributed

from ..errors import RegisterAdapterError
from ..neurons.search import ALL_THE_SAME
from ..tuner.card_text import OFF
from ..utils.staging import real_path
from ..utils.text import one_line
from . import checkpoints
from .arguments import TrainArguments
from .checkpoints import CheckpointError
from .interruption import Interrupted
from .saving import how_to_upload

__all__ = ["farewell", "fit_advice", "is_of_another_process", "of_another_process", "summarise", "tell_fault"]

logger = logging.getLogger(__name__)

_RESUME, _OVERWRITE = "--resume-from-checkpoint", "--overwrite-output-dir"
#: Metrics that are shares.
_SHARES = ("accuracy", "zero_shot_agreement")
#: Seconds within which the main process has met the same fault, and the launcher has ended the others because of it.
_PATIENCE = 5.0
#: What gloo says of the others; nccl's errors have a class.
_ENDED = re.compile(r"closed by peer|reset by peer|refused|broken pipe|timed out", re.IGNORECASE)


@contextmanager
def fit_advice() -> Iterator[None]:
    """Where a fit before a run finds nothing, say what the run's flags can do: they name no threshold."""
    try:
        yield
    except RegisterAdapterError as error:
        if ALL_THE_SAME not in str(error):
            raise
        advice = (
            "Choose another --init; or say which patches are outliers to `register-adapter fit` (--threshold, "
            "--top-block), and train from what it writes (--adapter-name-or-path)."
        )
        raise type(error)(str(error).replace(ALL_THE_SAME, advice)) from error


def summarise(results: dict[str, Any], output_dir: str) -> str:
    """A few lines for people, from what :func:`register_adapter.training.train` returns."""
    steps = results["global_step"]
    lines = [
        f"trained for {steps} step{'s' if steps != 1 else ''}{', stopped early' if results['stopped_early'] else ''}"
    ]
    same = ", the same head" if results["objective"].get("labels") else ""
    same = ", all else the same" if set(results["trained"]) - {"registers", "head"} else same
    if results["resumed_from_checkpoint"]:
        lines[0] += f", resumed from {results['resumed_from_checkpoint']}"
    metrics = results["metrics"]
    for name, value in metrics.items():
        if name.startswith("eval_") and not name.startswith(OFF):
            name = name.removeprefix("eval_")
            off = metrics.get(f"{OFF}{name}")
            without = f" (registers off{same}: {_number(name, off)})" if off is not None else ""
            lines.append(f"{name} on {results['eval_samples']} held-out images: {_number(name, value)}{without}")
    best = results["best"]
    if best:
        is_saved = results["arguments"]["load_best_model_at_end"] or best["step"] == steps
        saved = "saved is" if is_saved else "saved is the last step; best was"
        value = _number(best["metric"].removeprefix("eval_"), best["value"])
        lines.append(f"{saved} step {best['step']}, with {best['metric']} {value}")
    lines.append(f"adapter, card, results.json and run.yaml: {output_dir}")
    if "pushed_to" in results:
        lines.append(f"pushed to {results['pushed_to']}")
    return "\n".join(lines)


def _number(name: str, value: float) -> str:
    return f"{value:.1%}" if name in _SHARES else f"{value:.4g}"


def tell_fault(message: str, state: PartialState) -> None:
    """Say why a run ends: the main process at once, another one if it turns out to be alone with its fault.

    Most faults all processes meet, and one line is enough. A file that one of them alone cannot read only that one
    can name.
    """
    if state.is_main_process:
        logger.error("%s", message)
        return
    with suppress(KeyboardInterrupt):  # it is asked to end with the others, one of which has said why
        time.sleep(_PATIENCE)
        where = f"process {state.process_index} of {state.num_processes}"
        logger.error("%s: %s", where, message, extra={"of_one_process": True})


def farewell(stop: Interrupted, args: TrainArguments, prog: str, argv: Sequence[str]) -> str:
    """One line for a run that a signal has ended: what is there, and the command that goes on.

    Args:
        stop: How it ended.
        args: The knobs.
        prog: Name of the program.
        argv: The arguments that it was started with.
    """
    if stop.saved:
        return f"{stop}; {how_to_upload(args)}"
    # What the run was to be resumed from, before it came to that.
    checkpoint = stop.checkpoint or (_found(args.resume_from_checkpoint, args) if args.resume_from_checkpoint else None)
    return f"{stop}; {_how_to_go_on(checkpoint, args, prog, argv)}"


def is_of_another_process(error: RuntimeError) -> bool:
    """Whether an error is of a run on several processes, one of which has ended or cannot be reached any more."""
    kinds = (distributed.DistBackendError, distributed.DistNetworkError) if distributed.is_available() else ()
    return isinstance(error, kinds) or ("gloo" in str(error) and _ENDED.search(str(error)) is not None)


def of_another_process(error: RuntimeError, args: TrainArguments, prog: str, argv: Sequence[str]) -> str:
    """One line for a run, one process of which has ended: what is there, and the command that goes on."""
    said = f"another process of this run has ended, or cannot be reached ({one_line(error, 200)})"
    return f"{said}; {_how_to_go_on(_found('latest', args), args, prog, argv)}"


def _how_to_go_on(checkpoint: Path | None, args: TrainArguments, prog: str, argv: Sequence[str]) -> str:
    if checkpoint is None:
        return f"no checkpoint is there; start again with: {_command(prog, argv)}"
    own = real_path(checkpoint).parent == real_path(str(args.output_dir))
    words = [*_without(argv, (_RESUME, _OVERWRITE)), _RESUME, "latest" if own else str(checkpoint)]
    return f"{checkpoint} is complete; go on with: {_command(prog, words)}"


def _found(which: str, args: TrainArguments) -> Path | None:
    try:
        return checkpoints.find(which, str(args.output_dir))
    except CheckpointError:
        return None


def _without(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The arguments without some flags and their values."""
    kept, skipping = [], False
    for word in argv:
        if word.startswith("--"):
            skipping = word.partition("=")[0].replace("_", "-") in flags
        if not skipping:
            kept.append(word)
    return kept


def _command(prog: str, argv: Sequence[str]) -> str:
    script = prog.endswith(".py")  # a user's own, which has an objective of theirs
    what = shlex.quote(prog) if script else f"-m {prog}"
    start = prog if " " in prog and not script else f"python {what}"
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        start = f"accelerate launch [its options] {what}"
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        start = f"torchrun [its options] {what}"
    return f"{start} {shlex.join(argv)}"
