"""Files made to hurt whoever reads them: refused by name, at once, and before anything is read or changed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import random
import resource
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs, perturb
from helpers import Snapshot
from peft import PeftModel
from safetensors.torch import save_file

from register_adapter import (
    AdapterFileError,
    Anatomy,
    BaseModelMismatchError,
    RegisterConfig,
    RegisterPeftModel,
    UnsupportedModelError,
    add_registers,
    compose,
    load_adapters,
)
from register_adapter.utils.adapter_file import check_adapter_file, read_header, read_tensors
from register_adapter.utils.files import checksum

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


def test_a_name_that_is_not_utf_8_is_not_called_a_broken_file(tmp_path: Path) -> None:
    """As an adapter's folder may have one: the file is whole, and to save it again would help nobody."""
    folder = tmp_path / os.fsdecode(b"\xe9t\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    save_file({KEY: torch.zeros(4, 8)}, tmp_path / "whole.safetensors")
    shutil.copy(tmp_path / "whole.safetensors", folder)
    assert KEY in read_tensors(tmp_path / "whole.safetensors")
    with pytest.raises(AdapterFileError, match=r"a name that is not UTF-8.*rename it"):
        read_tensors(folder / "whole.safetensors")


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


def test_a_name_of_a_million_characters_is_not_repeated_whole(tmp_path: Path) -> None:
    header = {KEY: entry([4, 8], size=128), "x" * 10**6: entry([0])}
    path = write_header(tmp_path / "long.safetensors", header, 2 * 10**6)
    with pytest.raises(AdapterFileError, match="does not mention") as caught:
        check_adapter_file(path, SHAPES, None)
    assert len(str(caught.value)) < 5000


def test_heads_are_counted_before_they_are_looked_for(tmp_path: Path) -> None:
    path = write_header(tmp_path / "x.safetensors", {KEY: entry([4, 8], size=128), "x" * 10**6: entry([0])}, 2 * 10**6)
    with pytest.raises(AdapterFileError, match="100000 modules_to_save, where an adapter has a few"):
        check_adapter_file(path, SHAPES, [f"head{number}" for number in range(10**5)])


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
    try:
        save_file({**tensors, "base_model.model.classifier.weight": weight}, tmp_path / "bad.safetensors")
    except KeyError:
        pytest.skip(f"this safetensors cannot write {weight.dtype}")
    with pytest.raises(AdapterFileError, match=r"bad\.safetensors cannot be loaded: .*classifier\.weight"):
        check_adapter_file(tmp_path / "bad.safetensors", SHAPES, ["classifier"])


# --- configs and headers, spoiled at random ---------------------------------------------------------------------------

REFUSALS = (AdapterFileError, BaseModelMismatchError, UnsupportedModelError)
NASTY: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1.5,
        2**63,
        -(2**63),
        10**400,
        float("inf"),
        float("nan"),
        "",
        "x" * 10_000,
        "../../etc/passwd",
    ),
    *("\x00", "__class__", [], [None], ["a"], [[[]]], {}, {"a": 1}, {"0": 10**400}, {"0": [1, 1]}, [10**400]),
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, Path]:
    """A base model, noted as it is, and a good adapter of it."""
    folder, base = tmp_path_factory.mktemp("adapter"), build("vit")
    model = add_registers(base, 4)
    model.save_pretrained(folder)
    model.unload()
    return Snapshot(base.requires_grad_(True).eval(), make_inputs("vit")), folder


def load_spoiled(snapshot: Snapshot, folder: Path) -> bool:
    """Whether an adapter is let in; if not, the file is named and the base is as it was, by one of three errors."""
    base = snapshot.model
    said = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            RegisterPeftModel.from_pretrained(base, str(folder)).unload()
        except REFUSALS as error:
            said = str(error)
    if said is not None:
        assert str(folder) in said, "the file is not named"
        snapshot.check()
        return False
    base.requires_grad_(True)
    base.eval()
    snapshot.check()
    return True


def places(values: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every field of a config, of the identity and of the anatomy in it, and some that are not there."""
    fields = [*values, "anatomy", "ignore_base_mismatch", "runtime_config", "self"]
    inner = [("base_tower", name) for name in values["base_tower"]]
    anatomy = [("anatomy", item.name) for item in dataclasses.fields(Anatomy)]
    return [*((name,) for name in fields), *inner, *anatomy]


@pytest.mark.slow
def test_a_config_with_any_value_anywhere_is_refused_or_fits(subject: tuple[Snapshot, Path], tmp_path: Path) -> None:
    snapshot, good = subject
    config = json.loads((good / "adapter_config.json").read_text())
    cases = [(place, value) for place in places(config) for value in NASTY]
    refused = 0
    for number, (place, value) in enumerate(random.Random(0).sample(cases, 300)):
        spoiled = copy.deepcopy(config)
        holder = spoiled
        if len(place) > 1:
            plain = {"family": "vit", "embeddings": "embeddings", "blocks": "layers", "remove": "layernorm"}
            holder = spoiled[place[0]] = {**(spoiled.get(place[0]) or plain)}
        holder[place[-1]] = value
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        (folder / "adapter_config.json").write_text(json.dumps(spoiled))
        refused += not load_spoiled(snapshot, folder)
    assert refused > 150


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.slow
def test_bytes_spoiled_at_random_are_refused_or_fit(name: str, subject: tuple[Snapshot, Path], tmp_path: Path) -> None:
    snapshot, good = subject
    whole = (good / name).read_bytes()
    end = len(whole) if name.endswith("json") else 8 + int.from_bytes(whole[:8], "little")
    choose, refused = random.Random(1), 0
    for number in range(100):
        data = bytearray(whole)
        for _ in range(choose.randint(1, 4)):
            place = choose.randrange(end)
            data[place : place + choose.choice((0, 1, 1, 5))] = choose.randbytes(choose.choice((0, 1, 1, 3)))
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        (folder / name).write_bytes(bytes(data))
        refused += not load_spoiled(snapshot, folder)
    assert refused > 80


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("task_type", "\x1b[31mred\nERROR: a line of its own\u202e", r"\x1b[31mred\nERROR: a line of its own\u202e"),
        ("init", "a" * 100_000, "got 'aaaa"),
        ("id2label", "a" * 100_000, "got 'aaaa"),
        ("gate", ["a"] * 100_000, "got ['a', 'a'"),
        ("family", "\x1b[31m\nERROR: " + "a" * 100_000, r"vision tower \x1b[31m\nERROR: aaaa"),
    ],
)
def test_an_error_is_one_short_line_whatever_the_value(
    field: str, value: Any, shown: str, subject: tuple[Snapshot, Path], tmp_path: Path
) -> None:
    snapshot, good = subject
    config = json.loads((good / "adapter_config.json").read_text())
    (config["base_tower"] if field == "family" else config)[field] = value
    shutil.copytree(good, tmp_path / "bad")
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(REFUSALS) as refusal:
        PeftModel.from_pretrained(snapshot.model, str(tmp_path / "bad"))
    said = str(refusal.value)
    assert str(tmp_path / "bad") in said
    assert shown in said
    assert said.isprintable()
    assert len(said) < 1000
    snapshot.check()


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b'{"gate": 1e', b"\x80"])
def test_a_config_that_breaks_a_parser_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        RegisterConfig.from_pretrained(str(tmp_path))
    (tmp_path / "adapters.json").write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"adapters\.json"):
        load_adapters(build("vit"), tmp_path)


# --- a save that was cut short ----------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def save_until_killed(model: Any, folder: Path, moves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves until ``moves`` files have been moved to where they belong; the next move ends the process, as it were."""
    done: list[Any] = []
    replace = Path.replace

    def killed(self: Path, target: Any) -> Any:
        if len(done) == moves:
            raise Killed
        done.append(target)
        return replace(self, target)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Path, "replace", killed)
        model.save_pretrained(folder)


@pytest.mark.parametrize("moves", range(4))
@pytest.mark.parametrize("earlier", ["with a checksum", "without one"])
def test_after_a_killed_save_the_old_adapter_is_there_or_none(
    moves: int, earlier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other() -> Any:
        base = build("vit")
        perturb(base, seed=3)
        return base

    add_registers(build("vit"), 4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    assert values["weights_sha256"] == checksum(tmp_path / "adapter_model.safetensors")
    if earlier == "without one":
        del values["weights_sha256"]
        path.write_text(json.dumps(values))
    old = (tmp_path / "adapter_model.safetensors").read_bytes()
    save_until_killed(add_registers(other(), 4), tmp_path, moves, monkeypatch)
    is_old = (tmp_path / "adapter_model.safetensors").read_bytes() == old
    for base, fits in ((build("vit"), is_old), (other(), not is_old)):
        for load in (PeftModel.from_pretrained, lambda base, folder: base.load_adapter(folder)):
            try:
                load(copy.deepcopy(base), str(tmp_path))
            except (AdapterFileError, BaseModelMismatchError):
                assert moves in (1, 2) or not fits
            else:
                assert fits, "weights of one base were loaded into another"


def test_weights_of_another_save_are_refused(subject: tuple[Snapshot, Path], tmp_path: Path) -> None:
    snapshot, good = subject
    shutil.copytree(good, tmp_path / "adapter")
    add_registers(build("vit"), 4, init_std=1.0).save_pretrained(tmp_path / "again")
    shutil.copy(tmp_path / "again" / "adapter_model.safetensors", tmp_path / "adapter")
    for load in (PeftModel.from_pretrained, RegisterPeftModel.from_pretrained):
        with pytest.raises(AdapterFileError, match=r"is not the file that .*adapter_config\.json was saved with"):
            load(snapshot.model, str(tmp_path / "adapter"))
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**values, "weights_sha256": None}))
    assert load_spoiled(snapshot, tmp_path / "adapter")


def test_a_config_of_several_adapters_is_compared_too(tmp_path: Path) -> None:
    compose(build("vit"), {"one": RegisterConfig(num_registers=2)}).save_pretrained(tmp_path)
    load_adapters(build("vit"), tmp_path)
    path = tmp_path / "one" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attentions": "full"}))
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json is not the file that adapters\.json describes"):
        load_adapters(build("vit"), tmp_path)
