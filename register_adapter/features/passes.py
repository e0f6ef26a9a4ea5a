"""One pass of a vision tower over images, and what is read from it.

:func:`open_pass` resolves all that a pass needs (the tower, the batches, their device and dtype, evaluation mode, a
progress bar), and consumers read from its forward passes: one pass can feed several of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..data.batches import Batch as Inputs
from ..data.batches import ImageBatches, slice_batch
from ..data.processors import source_of
from ..data.sources import telling_images
from ..towers.anatomy import Anatomy
from ..towers.calls import first_of, hidden_states_of
from ..towers.modes import evaluating
from ..towers.tower import Tower
from ..tuner.hooks.call_state import Outside
from ..tuner.layer import RegisterLayer
from ..utils.arguments import check_whole
from .layout import adapters_stay, each_outside, tower_of
from .threads import in_this_thread

__all__ = [
    "Batch",
    "Consumer",
    "ImagePass",
    "PassOptions",
    "keep_layer",
    "open_pass",
    "place_of",
    "resolve_layer",
    "run_whole",
]

_Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PassOptions:
    """How images are read, and how they enter the tower.

    Attributes:
        image_processor: One of transformers, or a function from a PIL image to ``(3, H, W)``; ``None`` looks up the
            model's own, if the images need one.
        batch_size: Number of images in a batch; ready batches stay as they are.
        max_images: Use at most this many images, the first ones.
        num_workers: Number of threads that read images.
        strict: Refuse bad images instead of skipping them with a warning.
        progress: Show a progress bar.
        dtype: Of floating point inputs; ``None`` takes that of the tower's weights.
        report: Warn of skipped images at the end.
    """

    image_processor: Any = None
    batch_size: int = 32
    max_images: int | None = None
    num_workers: int = 2
    strict: bool = False
    progress: bool = False
    dtype: torch.dtype | None = None
    report: bool = True


class Batch(NamedTuple):
    """What goes into the tower, the number B of its images, their labels ``(B,)`` int64, and their places.

    A place is that among all images that were given, bad ones counted.
    """

    inputs: Inputs
    size: int
    labels: _Labels | None
    numbers: Sequence[int] = ()

    def half(self, second: bool) -> Batch:
        """The first or the second half of the images."""
        part = slice(self.size // 2, None) if second else slice(self.size // 2)
        size = self.size - self.size // 2 if second else self.size // 2
        labels = None if self.labels is None else self.labels[part]
        return Batch(slice_batch(self.inputs, part, self.size), size, labels, self.numbers[part])


class Consumer(Protocol):
    """Reads what it needs from the forward passes of one tower, which it is made for."""

    def attach(self) -> AbstractContextManager[object]:
        """A context that has hooks on the tower; they are gone on the way out, also after an exception."""

    def take(self, batch: Batch) -> None:
        """Called after each forward pass, with the batch that went through the tower."""


class ImagePass:
    """One pass over images; see :func:`open_pass`.

    Iterating gives the batches one after the other, on the tower's device, without running it; a second loop goes on
    where the first one stopped.

    Attributes:
        tower: The vision tower.
        registers: Its register layer, if it has one.
        device: Where the batches are placed.
        dtype: Their floating point dtype.
    """

    def __init__(
        self,
        tower: Tower,
        registers: RegisterLayer | None,
        images: ImageBatches,
        options: PassOptions,
        labels: _Labels | None,
        with_labels: bool,
        title: str,
        outside: Outside,
    ) -> None:
        self.tower, self.registers = tower, registers
        if (given := options.dtype) is not None and not (isinstance(given, torch.dtype) and given.is_floating_point):
            raise TypeError(f"dtype must be a floating point dtype of torch, such as torch.bfloat16, got {given!r}")
        self.device, dtype = place_of(tower)
        self.dtype = options.dtype or dtype
        self._images = images
        self._labels, self._with_labels = labels, with_labels
        self._title, self._progress, self._report = title, options.progress, options.report
        self._outside = outside
        self._batches: Generator[Batch, None, None] = self._read()

    @property
    def total(self) -> int | None:
        """Number of images, bad ones counted; ``None`` if it is not known before."""
        return self._images.total

    @property
    def skipped(self) -> list[str]:
        """A line for each image that was left out so far: its name and what is wrong with it."""
        return self._images.skipped

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def close(self) -> None:
        """Stop reading images; nothing is left of the pass."""
        self._batches.close()

    def run(self, *consumers: Consumer) -> None:
        """Run the tower over all images that are left, and feed the consumers."""
        with closing(self), self.attached(*consumers):
            for batch in self:
                self.feed(batch, *consumers)

    @contextmanager
    def attached(self, *consumers: Consumer) -> Iterator[None]:
        """The tower in evaluation mode and without gradients, with the hooks of all consumers.

        The tower's mode, torch's random state and all hooks are as before on the way out, also after an exception.
        """
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.tower.module))
            for consumer in consumers:
                stack.enter_context(consumer.attach())
            yield

    def feed(self, batch: Batch, *consumers: Consumer) -> None:
        """Run the tower over one batch, inside :meth:`attached`, and hand the batch to the consumers."""
        with adapters_stay(self.registers):
            with telling_images(batch.inputs):
                self.tower.run(batch.inputs)
            for consumer in consumers:
                consumer.take(batch)

    def _read(self) -> Generator[Batch, None, None]:
        shown = tqdm(total=self._images.total, desc=self._title, unit="image", disable=not self._progress)
        try:
            with shown as bar:
                given = self._images.labelled(self.device, self.dtype, self.tower.module, report=False)
                for inputs, numbers, own in each_outside(given, self._outside):
                    labels = self._labels_of(numbers, own) if self._with_labels else None
                    yield Batch(inputs, len(numbers), labels, numbers)
                    bar.update(len(numbers))
        finally:
            if self._report:  # behind the bar, which it would break
                self._images.report_skipped()

    def _labels_of(self, numbers: range | list[int], own: Any) -> _Labels | None:
        """The labels of one batch: those given for all images, or those that came with it."""
        size = len(numbers)
        if own is not None and self._labels is not None:
            raise ValueError("labels were given twice: as labels= and with the images")
        if self._labels is None:
            labels = None if own is None else _whole_numbers(own)
        elif size and len(self._labels) <= numbers[-1]:
            raise ValueError(f"labels has {len(self._labels)} entries, and there are at least {numbers[-1] + 1} images")
        else:
            labels = self._labels[numbers]
        if labels is not None and labels.shape != (size,):
            raise ValueError(f"a batch of {size} images has labels of shape {labels.shape}; one per image is needed")
        return labels


def open_pass(
    model: nn.Module,
    images: Any,
    options: PassOptions | None = None,
    *,
    labels: Sequence[int] | npt.ArrayLike | None = None,
    with_labels: bool = False,
    target_modules: str | None = None,
    anatomy: Anatomy | None = None,
    title: str = "",
) -> ImagePass:
    """Prepare one pass of a model's vision tower over images; nothing is run yet.

    Args:
        model: A base model, a model with a head, or one with registers.
        images: Images or ready batches, see :func:`register_adapter.artifacts.audit`.
        options: How they are read.
        labels: Class of every image in their order, bad images included, if they come apart from the images.
        with_labels: Hand labels on, those in ``labels`` or those that come with the images. Otherwise labels are not
            looked at.
        target_modules: Name of the vision tower, where there are several.
        anatomy: Description of a model that the table does not have.
        title: What the progress bar is called.

    Raises:
        UnsupportedModelError: The model has no vision tower, or several and none has registers.
        ValueError: No images, no image processor, a number out of range, or labels that are not whole numbers. While
            iterating: fewer labels than images, or labels given twice.
        ImageFileError: While iterating: ``strict`` and an image is bad, or none is good.

    Example:
        >>> opened = open_pass(model, "photos/", PassOptions(batch_size=64))
        >>> statistics = Statistics(opened.tower)
        >>> opened.run(statistics)
    """
    options = options or PassOptions()
    tower, registers = tower_of(model, target_modules, anatomy)
    given = None if labels is None else _whole_numbers(labels)
    outside = Outside()  # before there are hooks of the pass
    with outside():  # the first image is looked at
        batches = ImageBatches(
            images,
            options.image_processor,
            model_name=source_of(model, tower),
            batch_size=options.batch_size,
            max_images=options.max_images,
            strict=options.strict,
            num_workers=options.num_workers,
        )
    return ImagePass(tower, registers, batches, options, given, with_labels, title, outside)


def place_of(tower: Tower) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the images: those of the tower's first floating point weight."""
    weights = [*tower.module.parameters(), *tower.module.buffers()]
    for weight in weights:
        if weight.is_floating_point() and weight.element_size() > 1:
            return weight.device, weight.dtype
    return (weights[0].device if weights else torch.device("cpu")), torch.float32


def _whole_numbers(labels: Any) -> _Labels:
    values = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if values.dtype.kind not in "iu":
        raise ValueError(f"labels must be numbers of classes, found {values.dtype} such as {values.flat[0]!r}")
    return values.astype(np.int64)


def resolve_layer(tower: Tower, layer: int) -> int:
    """``layer`` as an index into ``hidden_states``, counted from the front.

    Raises:
        ValueError: The tower has no such layer.
        TypeError: It is no whole number.
    """
    check_whole("layer", layer)
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
        handle = blocks[0].register_forward_pre_hook(in_this_thread(before), with_kwargs=True)
    else:
        handle = blocks[index - 1].register_forward_hook(in_this_thread(behind), prepend=True)
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
