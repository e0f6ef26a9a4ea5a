"""Files made to hurt whoever reads them: refused by name, at once, and before anything is read or changed."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from register_adapter import AdapterFileError
from register_adapter.utils.adapter_file import check_adapter_file, read_header, read_tensors

KEY = "base_model.model.registers.register_adapter_tokens.weight"
SHAPES = {"registers.register_adapter_tokens.weight": (4, 8)}


def write_header(path: Path, header: Any, size: int = 0) -> Path:
    """A safetensors file of ``size`` bytes in all, of which none behind the header is written."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(max(size, file.tell()))
    return path


def entry(shape: list[Any], dtype: str = "F32", size: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


@pytest.mark.parametrize("reader", [read_header, read_tensors])
def test_a_pipe_is_refused_at_once(tmp_path: Path, reader: Any) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(AdapterFileError, match="not a regular file"):
        reader(tmp_path / "pipe.safetensors")


HEADERS = {
    "100,000 dimensions": {KEY: entry([1] * 100_000, size=4)},
    "100,000 tensors": {f"{KEY}.{index}": entry([0]) for index in range(100_000)},
    "nested too deeply": b'{"a":' * 100_000,
    "a negative size": {KEY: entry([-1, 8])},
    "a size that is not a whole number": {KEY: entry([1e400, 8])},
    "an unknown dtype": {KEY: entry([4, 8], "F32; import os", 128)},
    "a tensor without a shape": {KEY: None},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_refused_with_the_files_name(tmp_path: Path, header: Any) -> None:
    path = write_header(tmp_path / "adapter_model.safetensors", header)
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        check_adapter_file(path, SHAPES, None)


def test_a_gigabyte_of_zeros_is_refused_by_its_header(tmp_path: Path) -> None:
    rows = 2**25
    path = write_header(tmp_path / "big.safetensors", {KEY: entry([rows, 8], size=rows * 32)}, rows * 32 + 200)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterFileError, match=r"has shape \(33554432, 8\), the config says \(4, 8\)"):
        check_adapter_file(path, SHAPES, None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17, "kilobytes that were read"


HEADS = {
    "complex": torch.zeros(2, 8, dtype=torch.complex64),
    "bool": torch.zeros(2, 8, dtype=torch.bool),
    "beyond float32": torch.full((2, 8), 1e300, dtype=torch.float64),
    "not finite": torch.full((2, 8), torch.nan),
}


@pytest.mark.parametrize("weight", HEADS.values(), ids=HEADS)
def test_a_head_has_finite_floats(tmp_path: Path, weight: torch.Tensor) -> None:
    tensors = {KEY: torch.zeros(4, 8), "base_model.model.classifier.weight": torch.zeros(2, 8)}
    save_file(tensors, tmp_path / "good.safetensors")
    check_adapter_file(tmp_path / "good.safetensors", SHAPES, ["classifier"])
    save_file({**tensors, "base_model.model.classifier.weight": weight}, tmp_path / "bad.safetensors")
    with pytest.raises(AdapterFileError, match=r"bad\.safetensors cannot be loaded: .*classifier\.weight"):
        check_adapter_file(tmp_path / "bad.safetensors", SHAPES, ["classifier"])
