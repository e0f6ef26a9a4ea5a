"""Files of features that are written row by row, so that memory does not grow with the number of images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

__all__ = ["WRITERS", "FileSpec", "Writer", "check_format"]


class _Kind(NamedTuple):
    """A number format: of torch, and its names in safetensors and Arrow (``None``: Arrow has none)."""

    torch: torch.dtype
    safetensors: str
    arrow: str | None


#: Number formats that features can be written in.
DTYPES = {
    "float32": _Kind(torch.float32, "F32", "float32"),
    "float16": _Kind(torch.float16, "F16", "float16"),
    "bfloat16": _Kind(torch.bfloat16, "BF16", None),
}
#: Bytes of a row group of parquet, about, which are kept until they are written; and of a part that is moved at once.
_GROUP, _PART = 16 * 2**20, 16 * 2**20
_FILES = "files"


@dataclass(frozen=True)
class FileSpec:
    """What a file of features is going to hold.

    Attributes:
        shapes: Of one image, by kind.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        total: Number of images, bad ones counted; ``None`` if it is not known before.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    total: int | None

    @property
    def bytes_per_image(self) -> int:
        """Bytes of a row, without the name of its file."""
        values = sum(math.prod(shape) for shape in self.shapes.values())
        return values * DTYPES[self.dtype].torch.itemsize + 8

    @property
    def nbytes(self) -> int | None:
        """Bytes of the file, within its header and names; ``None`` if the number of images is not known."""
        return None if self.total is None else self.total * self.bytes_per_image


class Writer(Protocol):
    """Writes rows as they come."""

    def __init__(self, path: Path, spec: FileSpec) -> None: ...

    def add(self, values: Mapping[str, torch.Tensor], index: Sequence[int], files: Sequence[str | None]) -> None:
        """Append the rows of a batch, float32."""

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what is said of the rows; the file is whole then."""

    def close(self) -> None:
        """Let go of the file, whole or not."""


def check_format(path: Path, dtype: str) -> None:
    """Refuse a file whose kind is not known, or cannot hold such numbers.

    Raises:
        ValueError: It is so.
    """
    if path.name in WRITERS:
        raise ValueError(f"{path} has no name before its ending; call it features{path.name}, for example")
    if path.suffix not in WRITERS:
        raise ValueError(f"{path} must end with {' or '.join(WRITERS)}, which says how features are written")
    if dtype not in DTYPES:
        raise ValueError(f"file_dtype={dtype!r}, expected one of {', '.join(DTYPES)}")
    if path.suffix == ".parquet" and DTYPES[dtype].arrow is None:
        raise ValueError(f"parquet has no {dtype}; take file_dtype='float16', or a file that ends with .safetensors")


def _rounded(values: Mapping[str, torch.Tensor], spec: FileSpec) -> dict[str, torch.Tensor]:
    """The values in the file's number format.

    Raises:
        ValueError: A shape is another one than before, or a number is not finite.
    """
    rounded = {}
    for kind, tensor in values.items():
        if tuple(tensor.shape[1:]) != spec.shapes[kind]:
            raise ValueError(f"{kind} of an image is {tuple(tensor.shape[1:])}, and was {spec.shapes[kind]} before")
        rounded[kind] = tensor.to(DTYPES[spec.dtype].torch)
        if not bool(torch.isfinite(rounded[kind]).all()):
            wide = " (float16 ends at 65504; take another dtype)" if bool(torch.isfinite(tensor).all()) else ""
            raise ValueError(f"{kind} has numbers that are not finite as {spec.dtype}{wide}")
    return rounded


class _SafetensorsWriter:
    """Tensors side by side in one file, each in a region of its own that is filled row by row.

    The header comes first and is as long as it can get; names of files, whose length is not known before, come last.
    """

    def __init__(self, path: Path, spec: FileSpec) -> None:
        if spec.total is None:
            raise ValueError(
                "how many images there are is not known before, which a safetensors file needs; write .parquet, or "
                "give a folder or a list"
            )
        self._spec, self._count, self._files = spec, 0, bytearray()
        # The widest numbers first, so that every region begins at a multiple of its own.
        self._rows = {"index": (8, "I64", ())} | {
            kind: (
                math.prod(shape) * DTYPES[spec.dtype].torch.itemsize,
                DTYPES[spec.dtype].safetensors,
                shape,
            )
            for kind, shape in spec.shapes.items()
        }
        self._reserved = 2**14 + len(self._header(spec.total, 2**60, {}))
        self._reserved += -self._reserved % 8
        self._file = path.open("w+b")

    def _starts(self, count: int) -> dict[str, int]:
        starts, place = {}, 0
        for name, (size, *_) in self._rows.items():
            starts[name], place = place, place + size * count
        return {**starts, _FILES: place}

    def _header(self, count: int, names: int, metadata: Mapping[str, str]) -> bytes:
        starts = self._starts(count)
        entries: dict[str, Any] = {"__metadata__": dict(metadata)}
        for name, (size, dtype, shape) in self._rows.items():
            ends = [starts[name], starts[name] + size * count]
            entries[name] = {"dtype": dtype, "shape": [count, *shape], "data_offsets": ends}
        ends = [starts[_FILES], starts[_FILES] + names]
        entries[_FILES] = {"dtype": "U8", "shape": [names], "data_offsets": ends}
        return json.dumps(entries).encode()

    def add(self, values: Mapping[str, torch.Tensor], index: Sequence[int], files: Sequence[str | None]) -> None:
        assert self._spec.total is not None
        starts = self._starts(self._spec.total)
        columns = {"index": torch.tensor(index, dtype=torch.int64), **_rounded(values, self._spec)}
        for name, tensor in columns.items():
            self._file.seek(8 + self._reserved + starts[name] + self._count * self._rows[name][0])
            self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._files += b"".join(f"{file or ''}\0".encode() for file in files)
        self._count += len(index)

    def finish(self, metadata: Mapping[str, str]) -> None:
        assert self._spec.total is not None
        before, after = self._starts(self._spec.total), self._starts(self._count)
        for name, (size, *_) in self._rows.items():  # close up where bad images left room
            self._move(before[name], after[name], size * self._count)
        names = bytes(self._files[:-1])
        self._file.seek(8 + self._reserved + after[_FILES])
        self._file.write(names)
        self._file.truncate()
        header = self._header(self._count, len(names), metadata)
        if len(header) > self._reserved:
            raise ValueError(f"metadata of {len(header)} bytes is too long for the header of {self._reserved}")
        self._file.seek(0)
        self._file.write(self._reserved.to_bytes(8, "little") + header.ljust(self._reserved))

    def _move(self, source: int, target: int, length: int) -> None:
        """Move bytes towards the beginning, a part at a time."""
        start = 8 + self._reserved
        for done in range(0, length if target < source else 0, _PART):
            self._file.seek(start + source + done)
            part = self._file.read(min(_PART, length - done))
            self._file.seek(start + target + done)
            self._file.write(part)

    def close(self) -> None:
        self._file.close()


class _ParquetWriter:
    """A row an image: ``index``, ``file``, and lists of fixed length, a row group at a time."""

    def __init__(self, path: Path, spec: FileSpec) -> None:
        self._spec, self._waiting, self._bytes = spec, list[Any](), 0
        fields = [pa.field("index", pa.int64()), pa.field("file", pa.string())]
        for kind, shape in spec.shapes.items():
            of_numbers: Any = getattr(pa, DTYPES[spec.dtype].arrow or "")()
            for length in reversed(shape):
                of_numbers = pa.list_(of_numbers, length)
            fields.append(pa.field(kind, of_numbers))
        self._schema: Any = pa.schema(fields)
        # A dictionary of numbers that are all different would make the file larger.
        self._writer: Any = parquet.ParquetWriter(path, self._schema, use_dictionary=False)

    def add(self, values: Mapping[str, torch.Tensor], index: Sequence[int], files: Sequence[str | None]) -> None:
        columns: list[Any] = [pa.array(index, pa.int64()), pa.array(files, pa.string())]
        for kind, tensor in _rounded(values, self._spec).items():
            column: Any = pa.array(np.ascontiguousarray(tensor.numpy()).reshape(-1))
            for length in reversed(self._spec.shapes[kind]):
                column = pa.FixedSizeListArray.from_arrays(column, length)
            columns.append(column)
        self._waiting.append(pa.Table.from_arrays(columns, schema=self._schema))
        self._bytes += len(index) * self._spec.bytes_per_image
        if self._bytes >= _GROUP:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
            self._waiting, self._bytes = [], 0

    def finish(self, metadata: Mapping[str, str]) -> None:
        self._write()
        self._writer.add_key_value_metadata(dict(metadata))
        self._writer.close()

    def close(self) -> None:
        self._writer.close()


#: Ending of a file to what writes it.
WRITERS: dict[str, type[Writer]] = {".safetensors": _SafetensorsWriter, ".parquet": _ParquetWriter}


@contextmanager
def opened_writer(path: Path, spec: FileSpec) -> Iterator[Writer]:
    """A writer of the file's kind, let go of at the end of the block."""
    writer = WRITERS[path.suffix](path, spec)
    try:
        yield writer
    finally:
        writer.close()
