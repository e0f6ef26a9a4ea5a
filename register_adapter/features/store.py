"""Features of many images on disk, computed once and read by training and evaluation.

A store is a folder with one ``store.json``, which says what is in it, and safetensors shards. A shard is there whole or
not at all, so filling goes on after a kill where it stopped, and several processes can each fill their share.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import AdapterFileError
from ..utils.adapter_file import read_header
from ..utils.files import open_regular
from ..utils.staging import staged, write_text
from ..utils.text import size_text

__all__ = ["STORE_NAME", "FeatureStore", "StoreError", "StoreSpec", "check_space", "read_spec"]

#: What says what is in a folder.
STORE_NAME = "store.json"
_SCALES = ".scales"
_NAME = re.compile(r"[\w.-]{1,200}")
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
#: Bytes of a shard, about; a shard is what a killed run loses.
_SHARD_BYTES = 64 * 2**20
_MOST_SPEC_BYTES = 16 * 2**20
_MOST_IMAGES, _MOST_VALUES = 2**32, 2**40


class StoreError(ValueError):
    """A store holds something else than what was asked for, is damaged, or does not fit on the disk."""


@dataclass(frozen=True)
class StoreSpec:
    """What a store holds.

    Attributes:
        count: Number of images.
        shapes: Name of each tensor of an image to its shape, such as ``{"patches": (P, D)}``.
        source: What the features depend on, ready for JSON: the base's identity, the processor's settings, the images,
            the recipe. A store is used again only with an equal one.
        dtype: ``"bfloat16"`` (default), ``"float16"``, ``"float32"``, or ``"int8"`` with one scale for each vector
            of the last dimension.
    """

    count: int
    shapes: Mapping[str, tuple[int, ...]]
    source: Mapping[str, Any]
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.count > _MOST_IMAGES:
            raise ValueError(f"a store holds at most {_MOST_IMAGES} images, got {self.count}")
        if self.count < 1 or not self.shapes or any(not shape or min(shape) < 1 for shape in self.shapes.values()):
            raise ValueError(f"a store needs at least one image and one value, got {self.count} of {self.shapes}")

    @property
    def bytes_per_image(self) -> int:
        """Bytes of one image's features on disk."""
        values = sum(math.prod(shape) for shape in self.shapes.values()) * _DTYPES[self.dtype].itemsize
        scales = sum(math.prod(shape[:-1]) for shape in self.shapes.values()) * 4
        return values + (scales if self.dtype == "int8" else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole store, within the shards' headers."""
        return self.count * self.bytes_per_image

    @property
    def images_per_shard(self) -> int:
        """Number of images in every shard but the last."""
        return min(self.count, max(1, _SHARD_BYTES // self.bytes_per_image))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"count": self.count, "shapes": shapes, "source": dict(self.source), "dtype": self.dtype}


class FeatureStore:
    """Named tensors of images, by the images' numbers.

    Args:
        folder: Where it is, or will be.
        spec: What it shall hold. A folder that holds a part of the same is gone on with.
        instead: What to choose where the disk has no room, for the message.

    Raises:
        StoreError: The folder holds features of something else, which the message names; or they do not fit on the
            disk. Nothing is written then.
        OSError: Nothing can be written there.

    Example:
        >>> store = FeatureStore("targets", StoreSpec(len(images), {"patches": (256, 384)}, {"base": identity}))
        >>> for shard in store.missing:
        ...     store.write(shard, compute(store.images_of(shard)))
        >>> store[7]["patches"].shape
        torch.Size([256, 384])
    """

    def __init__(
        self, folder: str | Path, spec: StoreSpec, instead: str = "another folder, fewer images, or dtype 'int8'"
    ) -> None:
        self.folder, self.spec, self._instead = Path(folder), spec, instead
        wanted = json.loads(json.dumps(spec.to_dict()))
        if (self.folder / STORE_NAME).exists():
            _compare(self.folder, _read_spec(self.folder), wanted)
            self._check_space()
        else:
            self._check_space()
            write_text(self.folder / STORE_NAME, json.dumps(wanted, indent=1) + "\n")
        self._open: dict[int, Any] = {}

    @classmethod
    def load(cls, folder: str | Path) -> FeatureStore:
        """Open a store for what it says it holds.

        Raises:
            StoreError: There is none, or its description is damaged.
        """
        return cls(folder, read_spec(folder))

    def __len__(self) -> int:
        return self.spec.count

    @property
    def num_shards(self) -> int:
        """Number of shards of the whole store."""
        return math.ceil(self.spec.count / self.spec.images_per_shard)

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be written."""
        return [shard for shard in range(self.num_shards) if not self._path(shard).is_file()]

    def images_of(self, shard: int) -> range:
        """Numbers of the images whose features are in a shard."""
        first = shard * self.spec.images_per_shard
        return range(first, min(first + self.spec.images_per_shard, self.spec.count))

    def write(self, shard: int, features: Mapping[str, torch.Tensor]) -> float:
        """Write a shard, whole or not at all.

        Args:
            shard: Its number.
            features: ``(n, *shape)`` of its images by name, any floating point dtype.

        Returns:
            The rounding's relative error, the largest over the names: root of the mean squared difference to
            ``features``, over their root mean square.

        Raises:
            ValueError: Other names or shapes, or values that are not finite.
            OSError: It cannot be written; the disk is full, for example.
        """
        wanted = {name: shape for name, shape in self._layout(shard).items() if name in self.spec.shapes}
        given = {name: tuple(values.shape) for name, values in features.items()}
        if given != wanted:
            raise ValueError(f"shard {shard} takes features of shapes {wanted}, got {given}")
        values = {name: value.detach().to("cpu", torch.float32) for name, value in features.items()}
        if broken := [name for name, value in values.items() if not bool(torch.isfinite(value).all())]:
            raise ValueError(f"{broken} of shard {shard} are not finite; nothing was written")
        tensors = _pack(values, self.spec.dtype)
        with staged(self.folder) as scratch:
            try:
                save_file(tensors, scratch / self._path(shard).name)
            except SafetensorError as error:  # a full disk
                raise OSError(f"{self._path(shard)} cannot be written: {error}") from error
        return max(_relative_error(_unpack(tensors)[name], value) for name, value in values.items())

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of one image, float32.

        Raises:
            IndexError: There is no such image.
            StoreError: Its shard is missing or damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        shard, row = divmod(index, self.spec.images_per_shard)
        try:
            file = self._open.get(shard)
            if file is None:  # the header first: a row of some other tensor may be gigabytes
                if {name: info.shape for name, info in read_header(self._path(shard)).items()} != self._layout(shard):
                    raise KeyError("other tensors than the store says")
                file = self._open[shard] = safe_open(self._path(shard), "pt")
            rows = {name: file.get_slice(name)[row : row + 1] for name in file.keys()}  # noqa: SIM118
            tensors = {name: value[0] for name, value in _unpack(rows).items()}
            if broken := [name for name, value in tensors.items() if not bool(value.isfinite().all())]:
                raise RuntimeError(f"{', '.join(broken)} of image {index}: numbers that are not finite")
            return tensors
        except (AdapterFileError, OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
            said = f"missing or damaged ({error.__cause__ or error}); delete it, and it is computed again"
            raise StoreError(f"{self._path(shard)} is {said}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # workers of a loader open the files themselves

    def fill(
        self,
        compute: Callable[[Sequence[int]], Mapping[str, torch.Tensor]],
        shards: Sequence[int] | None = None,
        on_shard: Callable[[int], None] | None = None,
    ) -> float:
        """Compute and write what is missing.

        Args:
            compute: From numbers of images to their features ``(n, *shape)`` by name.
            shards: The shards to look after, default all.
            on_shard: Called with the number of images of each shard that is written.

        Returns:
            The largest relative error of a shard, 0 if nothing was missing.
        """
        mine = set(range(self.num_shards) if shards is None else shards)
        worst = 0.0
        for shard in (number for number in self.missing if number in mine):
            worst = max(worst, self.write(shard, compute(self.images_of(shard))))
            if on_shard is not None:
                on_shard(len(self.images_of(shard)))
        return worst

    def _layout(self, shard: int) -> dict[str, tuple[int, ...]]:
        rows = {name: (len(self.images_of(shard)), *shape) for name, shape in self.spec.shapes.items()}
        scales = {name + _SCALES: (*shape[:-1], 1) for name, shape in rows.items()}
        return rows | (scales if self.spec.dtype == "int8" else {})

    def _path(self, shard: int) -> Path:
        return self.folder / f"features-{shard:05d}-of-{self.num_shards:05d}.safetensors"

    def _check_space(self) -> None:
        there_already = list(self.folder.glob(f"features-*-of-{self.num_shards:05d}.safetensors"))
        if folders := [path for path in there_already if path.is_dir()]:
            raise StoreError(f"{folders[0]} is a folder, in the place of a file of features; remove it")
        written = min(self.spec.count, len(there_already) * self.spec.images_per_shard)
        needed = (self.spec.count - written) * self.spec.bytes_per_image
        what = f"the features of {self.spec.count} images"
        check_space(self.folder, needed, what, self._instead)


def check_space(folder: Path, nbytes: int, what: str, instead: str) -> None:
    """Refuse to write more than the disk has room for.

    Args:
        folder: Where, whether it is there yet or not.
        nbytes: How many bytes.
        what: What they are, for the message.
        instead: What to choose then.

    Raises:
        StoreError: The disk has less left.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if nbytes > free:
        raise StoreError(f"{what} take {size_text(nbytes)}, and {folder} has {size_text(free)} left: choose {instead}")


def _pack(values: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    if dtype != "int8":
        return {name: value.to(_DTYPES[dtype]).contiguous() for name, value in values.items()}
    scales = {name: value.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127 for name, value in values.items()}
    packed = {name: (value / scales[name]).round().to(torch.int8) for name, value in values.items()}
    return {**packed, **{name + _SCALES: scale for name, scale in scales.items()}}


def _unpack(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    values = {name: value.to(torch.float32) for name, value in tensors.items() if not name.endswith(_SCALES)}
    return {name: value * tensors.get(name + _SCALES, torch.ones(())) for name, value in values.items()}


def _relative_error(rounded: torch.Tensor, values: torch.Tensor) -> float:
    return float((rounded - values).square().mean().sqrt() / values.square().mean().sqrt().clamp_min(1e-12))


def read_spec(folder: str | Path) -> StoreSpec:
    """What the store in a folder says it holds.

    Raises:
        StoreError: There is none, or its description is damaged.
    """
    values = _read_spec(Path(folder))
    shapes, count, source, dtype = (values.get(name) for name in ("shapes", "count", "source", "dtype"))
    fits = (
        isinstance(shapes, dict)
        and isinstance(source, dict)
        and isinstance(dtype, str)
        and _is_count(count, _MOST_IMAGES)
        and all(_NAME.fullmatch(name) and isinstance(shape, list) for name, shape in shapes.items())
        and all(_is_count(side, _MOST_VALUES) for shape in shapes.values() for side in shape)
        and all(math.prod(shape) <= _MOST_VALUES for shape in shapes.values())
    )
    try:
        if not fits:
            raise ValueError("count, shapes, source or dtype is missing or is none")
        sizes = {name: tuple(shape) for name, shape in values["shapes"].items()}
        return StoreSpec(values["count"], sizes, values["source"], str(dtype))
    except ValueError as error:
        raise StoreError(f"{Path(folder) / STORE_NAME} does not describe a store of features: {error}") from error


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _read_spec(folder: Path) -> dict[str, Any]:
    path = folder / STORE_NAME
    try:
        with open_regular(path) as file:
            values = json.loads(file.read(_MOST_SPEC_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} is no description of a store of features: {error}") from error
    if not isinstance(values, dict):
        raise StoreError(f"{path} is no description of a store of features")
    return values


def _compare(folder: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse another store's folder, and say in what it differs."""
    sources = (there.get("source"), wanted["source"])
    names = [name for name in ("count", "shapes", "dtype") if there.get(name) != wanted[name]]
    if isinstance(sources[0], dict):
        names += [name for name in {**sources[0], **sources[1]} if sources[0].get(name) != sources[1].get(name)]
    elif sources[0] != sources[1]:
        names.append("source")
    if names:
        raise StoreError(
            f"{folder} holds features of something else (differing: {', '.join(sorted(names))}); name another folder, "
            "or delete that one"
        )
