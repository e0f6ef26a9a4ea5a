"""Labelled batches, and the state of one layer in a forward pass over them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..data.batches import Batch as Inputs
from ..data.batches import ImageBatches, slice_batch
from ..towers.calls import first_of, hidden_states_of
from ..towers.tower import Tower
from .running import place_of

__all__ = ["Batch", "keep_layer", "read_batches", "resolve_layer", "run_whole"]


class Batch(NamedTuple):
    """What goes into the model, how many images it is, and their labels ``(B,)`` int64."""

    inputs: Inputs
    size: int
    labels: npt.NDArray[np.int64] | None

    def half(self, second: bool) -> Batch:
        """The first or the second half of the images."""
        part = slice(self.size // 2, None) if second else slice(self.size // 2)
        size = self.size - self.size // 2 if second else self.size // 2
        labels = None if self.labels is None else self.labels[part]
        return Batch(slice_batch(self.inputs, part, self.size), size, labels)


def read_batches(
    images: ImageBatches, labels: Sequence[int] | npt.ArrayLike | None, tower: Tower, progress: str | None = None
) -> Iterator[Batch]:
    """The batches, on the tower's device, with their labels.

    Args:
        images: The pictures.
        labels: Labels of all images in their order, of the bad ones too; ``None`` takes those that come with them.
        tower: The tower.
        progress: What a progress bar is called; ``None`` for none.

    Raises:
        ValueError: There are fewer labels than images, labels come both ways, or they are no whole numbers.
    """
    device, dtype = place_of(tower)
    given = None if labels is None else _whole_numbers(labels)
    with tqdm(total=images.total, desc=progress, unit="image", disable=progress is None) as bar:
        for inputs, numbers, own in images.labelled(device, dtype, tower.module):
            size = len(numbers)
            if own is not None and given is not None:
                raise ValueError("labels were given twice: as labels= and with the images")
            found = None if own is None else _whole_numbers(own)
            if given is not None:
                if size and len(given) <= numbers[-1]:
                    raise ValueError(
                        f"labels has {len(given)} entries, and there are at least {numbers[-1] + 1} images"
                    )
                found = given[numbers]
            if found is not None and found.shape != (size,):
                raise ValueError(f"a batch of {size} images has labels of shape {found.shape}; one a picture is needed")
            yield Batch(inputs, size, found)
            bar.update(size)


def _whole_numbers(labels: Any) -> npt.NDArray[np.int64]:
    found = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if found.dtype.kind not in "iu":
        raise ValueError(f"labels must be numbers of classes, found {found.dtype} such as {found.flat[0]!r}")
    return found.astype(np.int64)


def resolve_layer(tower: Tower, layer: int) -> int:
    """``layer`` as an index into ``hidden_states``, counted from the front.

    Raises:
        ValueError: The tower has no such layer.
    """
    count = len(tower.part("blocks")) + 1
    if not -count <= layer < count:
        raise ValueError(
            f"layer={layer} of {count}: 0 is the input of the first block, {count - 1} the last one's output"
        )
    return layer % count


@contextmanager
def keep_layer(tower: Tower, index: int) -> Iterator[list[torch.Tensor]]:
    """A list with ``hidden_states[index]`` ``(B, N, D)`` of the last forward pass; nothing of other layers is kept."""
    blocks: nn.ModuleList = tower.part("blocks")
    kept: list[torch.Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        kept[:] = [hidden_states_of(args, kwargs)]

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        kept[:] = [first_of(output)]

    if index == 0:
        handle = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = blocks[index - 1].register_forward_hook(behind, prepend=True)
    try:
        yield kept
    finally:
        handle.remove()


def run_whole(model: nn.Module, inputs: Inputs) -> torch.Tensor | None:
    """Call a model with its head, and give its logits ``(B, C)``, ``None`` if it has none.

    A bare tensor is taken for logits only where the model names their number, ``num_classes`` (timm, torchvision): it
    may be an embedding. A model that needs text too is not called.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = inspect.signature(base.forward).parameters
    if "input_ids" in names:
        return None
    extra = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in names else {}
    if isinstance(inputs, Mapping):
        output = model(**{**extra, **inputs})
    elif "pixel_values" in names:
        output = model(pixel_values=inputs, **extra)
    else:
        output = model(inputs)
    if isinstance(output, torch.Tensor):
        return output if output.ndim == 2 and output.shape[1] == getattr(base, "num_classes", 0) else None
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, torch.Tensor) and logits.ndim == 2 else None
