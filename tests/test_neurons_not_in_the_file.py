"""Values of register neurons that a loader does not find in a file: the adapter is refused, not guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import run
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from register_adapter import AdapterFileError, add_registers, find_register_layer
from register_adapter.tuner._peft_compat import REMAPS

PARTS = ("units", "usual", "limits", "strength", "weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter whose removal needs every value; with the output."""
    path = tmp_path_factory.mktemp("neurons")
    torch.manual_seed(0)
    base = build("vit")
    base.save_pretrained(path / "base")
    base.name_or_path = str(path / "base")
    model = add_registers(base, 2, register_neurons={1: [3, 5]}, remove="outliers").eval()
    tokens = find_register_layer(model).tokens("default")
    tokens.set_usual(torch.tensor([0.3, -0.2]), torch.tensor([0.01, 0.02]))
    model.save_pretrained(path / "adapter")
    return path


def _by_transformers(folder: Path, adapter: Path) -> Any:
    base = AutoModel.from_pretrained(folder / "base")
    base.load_adapter(str(adapter))
    return base


def _by_auto_model(folder: Path, adapter: Path) -> Any:
    return AutoModel.from_pretrained(adapter)


def _by_peft(folder: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModel.from_pretrained(folder / "base"), adapter)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("load", [_by_transformers, _by_auto_model, _by_peft])
def test_a_tensor_under_another_key(load: Callable[[Path, Path], Any], part: str, folder: Path, tmp_path: Path) -> None:
    expected = run(_by_peft(folder, folder / "adapter").eval(), make_inputs("vit"))["last_hidden_state"]
    values = load_file(folder / "adapter" / "adapter_model.safetensors")
    (key,) = (key for key in values if key.endswith(part))
    values[f"x.{key}"] = values.pop(key)
    save_file(values, tmp_path / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    del config["weights_sha256"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if load is _by_peft and REMAPS:  # finds them by the end of their key
        assert torch.equal(run(load(folder, tmp_path).eval(), make_inputs("vit"))["last_hidden_state"], expected)
        return
    with pytest.raises(AdapterFileError, match=r"got no .* register values|found 0 among"):
        load(folder, tmp_path)
