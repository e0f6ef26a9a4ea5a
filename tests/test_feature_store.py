"""Features on disk: what is written comes back, a filling goes on after a kill, and nothing else is taken for it."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from register_adapter.features.store import FeatureStore, StoreError, StoreSpec

SOURCE = {"base": {"family": "vit", "fingerprint": [0.1, 0.2]}, "views": 10}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("register_adapter.features.store._SHARD_BYTES", 600)


def make_spec(**changes: Any) -> StoreSpec:
    values = {"count": 10, "shapes": {"patches": (4, 8), "cls": (8,)}, "source": SOURCE, "dtype": "float32"}
    return StoreSpec(**{**values, **changes})


def compute(numbers: Any) -> dict[str, torch.Tensor]:
    parts = [torch.Generator().manual_seed(number) for number in numbers]
    return {
        "patches": torch.stack([torch.randn(4, 8, generator=part) for part in parts]),
        "cls": torch.stack([torch.randn(8, generator=part) for part in parts]),
    }


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("bfloat16", 4e-3), ("float16", 5e-4), ("int8", 1e-2)])
def test_what_is_written_comes_back(tmp_path: Path, dtype: str, error: float) -> None:
    store = FeatureStore(tmp_path, make_spec(dtype=dtype))
    stated = store.fill(compute)
    assert stated <= error
    assert (stated > 0) == (dtype != "float32")
    for number in (0, 3, 9):
        expected = {name: value[0] for name, value in compute([number]).items()}
        for name, value in store[number].items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected[name], atol=4 * error, rtol=4 * error)


def test_the_size_is_known_before_anything_is_written(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16", "int8"):
        spec = make_spec(dtype=dtype)
        store = FeatureStore(tmp_path / dtype, spec)
        store.fill(compute)
        written = sum(path.stat().st_size for path in (tmp_path / dtype).glob("*.safetensors"))
        assert spec.nbytes <= written <= spec.nbytes + 400 * store.num_shards


def test_filling_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    calls: list[Any] = []

    def dies(numbers: Any) -> dict[str, torch.Tensor]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(numbers)
        return compute(numbers)

    store = FeatureStore(tmp_path, make_spec())
    with pytest.raises(KeyboardInterrupt):
        store.fill(dies)
    again = FeatureStore(tmp_path, make_spec())
    assert again.missing == list(range(2, again.num_shards))
    done: list[int] = []
    again.fill(compute, on_shard=done.append)
    assert sum(done) == 10 - sum(map(len, calls))
    torch.testing.assert_close(again[9]["cls"], compute([9])["cls"][0])


def test_two_processes_fill_their_shares(tmp_path: Path) -> None:
    first, second = (FeatureStore(tmp_path, make_spec()) for _ in range(2))
    first.fill(compute, range(0, first.num_shards, 2))
    assert first.missing
    second.fill(compute, range(1, second.num_shards, 2))
    assert not first.missing
    torch.testing.assert_close(first[7]["patches"], compute([7])["patches"][0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"count": 11}, "count"),
        ({"shapes": {"patches": (4, 9), "cls": (8,)}}, "shapes"),
        ({"dtype": "int8"}, "dtype"),
        ({"source": {**SOURCE, "views": 4}}, "views"),
        ({"source": {**SOURCE, "base": {"family": "vit", "fingerprint": [0.3, 0.2]}}}, "base"),
    ],
)
def test_a_store_of_something_else_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    FeatureStore(tmp_path, make_spec()).fill(compute)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    with pytest.raises(StoreError, match=rf"differing: {named}\)"):
        FeatureStore(tmp_path, make_spec(**changes))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before


def test_what_the_disk_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(StoreError, match=r"has 100 bytes left: choose another folder, fewer images, or dtype 'int8'"):
        FeatureStore(tmp_path / "new", make_spec())
    assert not (tmp_path / "new").exists()


def test_a_folder_in_the_place_of_a_shard_is_named(tmp_path: Path) -> None:
    FeatureStore(tmp_path, make_spec()).fill(compute)
    shard = next(tmp_path.glob("*.safetensors"))
    shard.unlink()
    shard.mkdir()
    with pytest.raises(StoreError, match=rf"{shard.name} is a folder, .* remove it"):
        FeatureStore(tmp_path, make_spec())


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, make_spec())
    store.fill(compute)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(StoreError, match=rf"{shard.name} is missing or damaged .*; delete it"):
        FeatureStore(tmp_path, make_spec())[0]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(StoreError, match="not a regular file"):
        FeatureStore(tmp_path, make_spec())[0]


def describe(**changes: Any) -> str:
    return json.dumps({"count": 10, "shapes": {"patches": [4, 8]}, "source": {}, "dtype": "float32", **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"count": 10}',
        "[" * 100_000,
        *(describe(count=count) for count in (0, 10**12, 10**400, 1.5, True, "10")),
        describe().replace("10", "1e400"),
        describe(source=3),
        describe(dtype="int4"),
        *(describe(shapes=shapes) for shapes in ({}, {"patches": [1.5]}, {"../a": [4]}, {"a": 4}, {"a": [2**39, 4]})),
    ],
)
def test_a_damaged_description_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(StoreError, match=r"store\.json"):
        FeatureStore.load(tmp_path)


def test_a_store_says_what_it_holds_and_goes_to_other_processes(tmp_path: Path) -> None:
    FeatureStore(tmp_path, make_spec()).fill(compute)
    store = FeatureStore.load(tmp_path)
    assert len(store) == 10
    assert store.spec.shapes == {"patches": (4, 8), "cls": (8,)}
    store[0]
    copy = pickle.loads(pickle.dumps(store))
    torch.testing.assert_close(copy[5]["patches"], store[5]["patches"])
    with pytest.raises(IndexError, match="image 10 of 10"):
        store[10]


@pytest.mark.parametrize(
    "tensors",
    [
        {"patches": torch.zeros(3, 4, 8)},
        {"patches": torch.zeros(3, 4, 9), "cls": torch.zeros(3, 8)},
        {"patches": torch.zeros(1, 4, 8), "cls": torch.zeros(1, 8)},
        {"patches": torch.zeros(()), "cls": torch.zeros(3, 8)},
        {"patches": torch.zeros(3, 4, 8), "cls": torch.full((3, 8), math.nan)},
    ],
    ids=["fewer tensors", "another shape", "fewer rows", "no rows", "not finite"],
)
def test_a_shard_of_something_else_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    store = FeatureStore(tmp_path, make_spec())
    store.fill(compute)
    save_file(tensors, sorted(tmp_path.glob("*.safetensors"))[0])
    with pytest.raises(StoreError, match="is missing or damaged"):
        FeatureStore(tmp_path, make_spec())[2]


@pytest.mark.parametrize("shape", [[1] * 100_000, [3, 2**20, 8]], ids=["dimensions", "rows of gigabytes"])
def test_a_shard_is_compared_by_its_header(tmp_path: Path, shape: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    FeatureStore(tmp_path, make_spec()).fill(compute)
    size = 4 * math.prod(shape)
    header = json.dumps({"patches": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(shard, 8 + len(header) + size)
    monkeypatch.setattr("register_adapter.features.store.safe_open", lambda *_: pytest.fail("has opened it"))
    with pytest.raises(StoreError, match=rf"{shard.name} is missing or damaged"):
        FeatureStore(tmp_path, make_spec())[0]


@pytest.mark.parametrize("broken", ["shape", "name", "nan"])
def test_nothing_is_written_of_features_that_do_not_fit(tmp_path: Path, broken: str) -> None:
    store = FeatureStore(tmp_path, make_spec())
    features = compute(store.images_of(0))
    if broken == "shape":
        features["cls"] = features["cls"][:, :7]
    elif broken == "name":
        features["other"] = features.pop("cls")
    else:
        features["patches"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"takes features of shapes|not finite"):
        store.write(0, features)
    assert store.missing == list(range(store.num_shards))
