"""LOST and TokenCut on images under a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from ...features.layout import each_outside
from ...features.subjects import Subject, keeping_adapters, looking_at
from .boxes import DiscoveredObject
from .normalised_cut import tokencut_batch
from .patches import Features, PatchReader, Preparation, Prepared, Size, Wanted, each_image
from .seed_expansion import lost_batch

__all__ = ["METHODS", "Method", "Plan", "Reading", "discover", "run_plans"]

Method = Literal["lost", "tokencut"]
METHODS: dict[Method, Callable[..., list[Any]]] = {"lost": lost_batch, "tokencut": tokencut_batch}


@dataclass(frozen=True)
class Plan:
    """A method, the features that it works on, and its own settings.

    Attributes:
        method: ``"lost"`` or ``"tokencut"``.
        features: ``"keys"``, ``"queries"``, ``"values"`` or ``"tokens"``.
        block: Index of the block, -1 for the last.
        options: Settings of the method (``k_patches``, ``bias``, ``normalize``; ``tau``, ``eps``); its own defaults,
            those of its authors' code, for what is left out.

    Raises:
        ValueError: There is no such method, or it has no such setting.
    """

    method: Method = "lost"
    features: Features = "keys"
    block: int = -1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}, expected one of {', '.join(METHODS)}")
        known = [name for name in signature(METHODS[self.method]).parameters if name not in _OWN]
        if unknown := sorted(set(self.options) - set(known)):
            raise ValueError(f"{self.method} has no setting {', '.join(unknown)}; it has {', '.join(known)}")

    @property
    def wanted(self) -> Wanted:
        """The features, as they are read."""
        return Wanted(self.features, self.block)

    def to_dict(self) -> dict[str, Any]:
        """All settings, defaults included, JSON-ready."""
        parameters = signature(METHODS[self.method]).parameters
        defaults = {name: value.default for name, value in parameters.items() if name not in _OWN}
        return {"features": self.features, "block": self.block, **defaults, **self.options}


# Arguments of the methods that the image decides.
_OWN = ("features", "grid", "patch_size", "image_size")


class Reading(NamedTuple):
    """How images are read, whatever is done with them.

    Attributes:
        image_processor: Of transformers, or a torchvision transform with a ``Normalize``; ``None`` looks up the model's
            own.
        size: Pixels of the shorter side, or ``(height, width)``; ``None``: the image's own.
        batch_size: Images of one size that go through the model together, at most.
        antialias: Interpolate position embeddings with antialiasing.
        progress: Show a progress bar.
    """

    image_processor: Any = None
    size: Size = None
    batch_size: int = 16
    antialias: bool = True
    progress: bool = False


@keeping_adapters
def discover(
    model: nn.Module,
    images: Any,
    *,
    method: Method = "lost",
    features: Features = "keys",
    block: int = -1,
    image_processor: Any = None,
    size: Size = None,
    batch_size: int = 16,
    antialias: bool = True,
    progress: bool = False,
    **options: Any,
) -> list[DiscoveredObject]:
    """Find one object in each image by LOST or TokenCut, with any supported model, with or without registers.

    As in the authors' codes images keep their resolution and are padded with zeros to a multiple of the patch size, the
    patches of padding take part, and features are the keys of the last block. The model is left as it was.

    Args:
        model: Model of transformers, timm, OpenCLIP, torchvision or DINOv2's own code; active adapters take part.
        images: A folder, a path, a PIL image, an array ``(H, W, 3)`` uint8 or normalised pixel values ``(3, H, W)``, or
            many of them; also a batch ``(B, 3, H, W)``.
        method: ``"lost"``, see :func:`lost`, or ``"tokencut"``, see :func:`tokencut`.
        features: ``"keys"``, ``"queries"`` or ``"values"``, what the block's linear layers give, all heads side by
            side; or ``"tokens"``, the block's output, behind the final LayerNorm where the block is the last and the
            model's patch tokens go through it.
        block: Index of the block, -1 for the last.
        image_processor: Image processor of transformers, or a torchvision transform with a ``Normalize``: only how it
            normalises is used. ``None`` takes the model's own. Tensors need none.
        size: Pixels of the shorter side, or ``(height, width)``, that images are resized to before; ``None`` leaves
            them as they are, for models that interpolate their position embeddings.
        batch_size: Images of one size that go through the model together, at most.
        antialias: Interpolate position embeddings with antialiasing.
        progress: Show a progress bar.
        **options: Settings of the method: ``k_patches``, ``bias``, ``normalize``, or ``tau``, ``eps``.

    Returns:
        One entry an image, in their order, :class:`LostObject` or :class:`TokenCutObject`; boxes are in pixels of the
        image as it came.

    Raises:
        ValueError: There is no image, a setting is unknown or out of range, or the model fails on an image's size.
        ImageFileError: A file is not an image.
        UnsupportedModelError: The model has no vision tower, places of its patches are not known, or a block has no
            layer of a known name.
        MissingExtraError: SciPy is not installed.

    Example:
        >>> discover(model, ["cat.jpg", "dog.jpg"], method="tokencut")[0].box
    """
    plan = Plan(method, features, block, options)
    reading = Reading(image_processor, size, batch_size, antialias, progress)
    return [objects[0] for objects in run_plans(model, each_image(images), [plan], reading)]


def run_plans(
    subject: Subject, images: Iterable[Any], plans: Sequence[Plan], reading: Reading, title: str = "discovery"
) -> list[list[DiscoveredObject]]:
    """Objects of each image by each of several plans, all from one forward pass.

    Args:
        subject: A model, or a PEFT model with one of its adapters.
        images: See :meth:`Preparation.__call__`.
        plans: What is done with each image.
        reading: How images are read.
        title: What the progress bar is called.

    Returns:
        For each image a list with an entry for each plan.

    Raises:
        ValueError: ``batch_size`` is below 1; and see :func:`discover`.
    """
    if reading.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {reading.batch_size}")
    total = len(images) if isinstance(images, Sized) else None
    done: dict[int, list[DiscoveredObject]] = {}
    with looking_at(subject) as model:
        reader = PatchReader(model, [plan.wanted for plan in plans], reading.antialias)
        prepare = Preparation(model, reader.tower, reading.image_processor, reading.size)
        with tqdm(total=total, desc=title, unit="image", disable=not reading.progress) as bar:
            for batch in _batches(map(prepare, each_outside(images)), reading.batch_size):
                objects = _of_batch(reader, prepare.patch_size, plans, [image for _, image in batch])
                done.update((number, per_image) for (number, _), per_image in zip(batch, objects, strict=True))
                bar.update(len(batch))
    return [done[number] for number in sorted(done)]


def _batches(images: Iterable[Prepared], size: int) -> Iterator[list[tuple[int, Prepared]]]:
    """Numbered images of one size together; at most four batches of images wait for others of their size."""
    waiting: dict[tuple[tuple[int, ...], tuple[int, int]], list[tuple[int, Prepared]]] = {}
    for number, image in enumerate(images):
        key = tuple(image.pixels.shape), image.size
        waiting.setdefault(key, []).append((number, image))
        if len(waiting[key]) == size:
            yield waiting.pop(key)
        elif sum(map(len, waiting.values())) >= 4 * size:
            yield waiting.pop(max(waiting, key=lambda kind: len(waiting[kind])))
    yield from waiting.values()


def _of_batch(
    reader: PatchReader, patch_size: int, plans: Sequence[Plan], images: Sequence[Prepared]
) -> Iterator[list[DiscoveredObject]]:
    pixels = torch.stack([image.pixels for image in images])
    grid = (pixels.shape[2] // patch_size, pixels.shape[3] // patch_size)
    read = reader.read(pixels, grid)
    place = {"grid": grid, "patch_size": patch_size, "image_size": images[0].size}
    by_plan = [METHODS[plan.method](read[plan.wanted], **place, **plan.options) for plan in plans]
    for image, *objects in zip(images, *by_plan, strict=True):
        yield [image.in_original(item) for item in objects]
