"""Export of any model with registers to a file that needs neither this package nor PEFT: ONNX or ``torch.export``.

Both are traces of one forward pass in evaluation mode, registers and all; the image size is fixed, the batch is not.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ..errors import MissingExtraError
from ..towers.modes import evaluating
from ..utils.staging import file_to_write, staged
from .comparison import tensors
from .subject import Subject, call
from .subject import example_inputs as made_up

__all__ = ["export_onnx", "export_program"]


def _by_name(model: nn.Module, names: list[str]) -> nn.Module:
    """A module that takes tensors by name and returns a flat dictionary of tensors.

    No class of a library is needed to read what it returns, unlike the outputs of transformers.
    """

    def forward(*args: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return tensors(call(model, dict(zip(names, args, strict=False)) | inputs))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    # torch.export names the inputs after the signature, and does not get along with a bare **inputs.
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    wrapper = nn.Module()
    wrapper.model = model
    wrapper.forward = forward
    return wrapper


def export_program(
    model: nn.Module,
    path: str | Path,
    example_inputs: dict[str, torch.Tensor] | None = None,
    dynamic_batch: bool = True,
) -> tuple[str, ...]:
    """Save a model with its registers as a ``torch.export`` program (``.pt2``).

    The program takes the inputs by name and returns a dictionary of tensors::

        torch.export.load("model.pt2").module()(pixel_values=x)["last_hidden_state"]

    Args:
        model: A model with an active register adapter; other adapters (LoRA) may be active beside it. Not changed.
        path: The file.
        example_inputs: Tensors by name for one forward pass; default random images of the config's size. They fix
            every size but the batch; make the batch at least 2.
        dynamic_batch: Whether the batch size (the first dimension of every input) may be another one later.

    Returns:
        Names of the outputs.

    Raises:
        ValueError: No active registers, no inputs could be made up, or the path is a folder or empty.
        OSError: The file cannot be written; what was there before is untouched.
    """
    target = file_to_write(path)
    program, names = _traced(model, example_inputs, dynamic_batch)
    with staged(target.parent) as scratch, (scratch / target.name).open("wb") as file:
        written = _Remembering(file)
        torch.export.save(program, cast(Any, written))
        if written.error is not None:
            raise written.error
    return names


class _Remembering(io.RawIOBase):
    """A file that takes everything and remembers what went wrong: torch ends the process where writing fails."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, cast(OSError | None, None)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        return place if self.error is not None else self.file.seek(place, whence)

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: dict[str, torch.Tensor] | None = None,
    dynamic_batch: bool = True,
) -> tuple[str, ...]:
    """Save a model with its registers as an ONNX file, weights inside.

    Inputs and outputs have the names of the model's own.

    Args:
        model: As for :func:`export_program`.
        path: The file; weights that do not fit into one file of 2 GB go into ``<path>.data``. A process that is killed
            while the two are put in place leaves no file ``path``, never one beside the weights of another export.
        example_inputs: As for :func:`export_program`.
        dynamic_batch: As for :func:`export_program`.

    Returns:
        Names of the outputs.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ValueError: No active registers, no inputs could be made up, or the path is a folder or empty.
        OSError: The file cannot be written; what was there before is untouched.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("ONNX files", package, "onnx")
    target = file_to_write(path)
    program, names = _traced(model, example_inputs, dynamic_batch)
    # It traces the program again; with gradients SDPA would take a path whose views do not fit any batch.
    with torch.no_grad():
        onnx: Any = torch.onnx.export(program, dynamo=True, verbose=False, output_names=list(names))
    # Under its final name: large weights are referred to by name. The graph is moved after them.
    with staged(target.parent, last=(target.name,)) as scratch:
        onnx.save(str(scratch / target.name))
        if (scratch / f"{target.name}.data").exists():
            target.unlink(missing_ok=True)  # so a kill between the two leaves no earlier graph beside these weights
    return names


def _traced(
    model: nn.Module, example_inputs: dict[str, torch.Tensor] | None, dynamic_batch: bool
) -> tuple[ExportedProgram, tuple[str, ...]]:
    subject = Subject.of(model)
    inputs = made_up(subject) if example_inputs is None else dict(example_inputs)
    shapes: dict[str, Any] = {name: {0: Dim.DYNAMIC} if dynamic_batch else None for name in inputs}
    wrapper = _by_name(subject.base, list(inputs))
    with evaluating(subject.base), subject.layer.staying():  # whatever other threads set meanwhile
        names = tuple(wrapper(**inputs))
        program = torch.export.export(wrapper.eval(), (), inputs, dynamic_shapes=shapes, strict=False)
    return program, names
