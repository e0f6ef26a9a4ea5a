"""Classes of a head that LoRA or tuned norms save as a whole: they come back, and go with the head."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import build, make_inputs
from helpers import Snapshot, run
from peft import LNTuningConfig, LoraConfig

from register_adapter import AdapterFileError, PositionConfig, compose, load_adapters
from register_adapter.tuner.composed.class_names import classes_of

CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(target_modules=["q_proj", "query"], modules_to_save=["classifier"]),
    "norms": LNTuningConfig(target_modules=["layernorm_before"], modules_to_save=["classifier"]),
    "positions": PositionConfig(modules_to_save=["classifier"]),
}
NAMES = ["circle", "cross", "ring"]


def base(names: list[str]) -> Any:
    config = build("vit").config
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.ViTForImageClassification(config).eval()


def saved(method: str, folder: Path) -> torch.Tensor:
    model = compose(base(NAMES), {"own": CONFIGS[method]})
    head = model.get_base_model().classifier.modules_to_save["own"]  # type: ignore[union-attr, index]
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return run(model.eval(), make_inputs("vit"))["logits"]


@pytest.mark.parametrize("own", [["dog", "cat", "cow"], ["a", "b"]], ids=["as many", "others"])
@pytest.mark.parametrize("method", CONFIGS)
def test_they_come_back_and_go_with_the_head(method: str, own: list[str], tmp_path: Path) -> None:
    logits, inputs = saved(method, tmp_path), make_inputs("vit")
    assert f"`own`: Classes of the head | 3: `{'`, `'.join(NAMES)}`" in (tmp_path / "README.md").read_text("utf-8")
    given = base(own)
    plain = run(given, inputs)["logits"]
    model: Any = load_adapters(given, tmp_path)
    assert torch.equal(run(model, inputs)["logits"], logits)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: index for index, name in enumerate(NAMES)}
    assert run(model, {**inputs, "labels": torch.tensor([2] * len(inputs["pixel_values"]))})["loss"].isfinite()
    with model.disable_adapter():
        assert model.config.id2label == dict(enumerate(own))
    assert model.config.num_labels == 3
    # Names that are given meanwhile are kept, and saved; what is saved again is the same.
    model.config.id2label = dict(enumerate(["x", "y", "z"]))
    model.save_pretrained(tmp_path / "again")
    again: Any = load_adapters(base(own), tmp_path / "again")
    assert again.config.id2label == dict(enumerate(["x", "y", "z"]))
    off = again.unload() if own == ["a", "b"] else again
    if off is again:
        again.delete_adapter("own")
    assert off.config.id2label == dict(enumerate(own))
    assert torch.equal(run(again.get_base_model(), inputs)["logits"], plain)


def pickled(model: Any) -> Any:
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    return torch.load(whole, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "torch.save"])
def test_a_copy_has_the_classes_and_gives_the_base_its_own_again(copied: Any, tmp_path: Path) -> None:
    logits, inputs, own = saved("lora", tmp_path), make_inputs("vit"), {0: "a", 1: "b"}
    model: Any = load_adapters(base(["a", "b"]), tmp_path)
    other = copied(model)
    off = other.unload()
    assert off.config.id2label == own
    assert not [name for name in vars(off) if name not in vars(base(["a", "b"]))]
    assert torch.equal(run(model, inputs)["logits"], logits)
    assert model.config.id2label == dict(enumerate(NAMES))
    again = copied(model)
    with again.disable_adapter():
        assert again.config.id2label == own
        assert model.config.id2label == dict(enumerate(NAMES))
    assert again.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("classes", [5, {"0": 1}, {"1": "a"}, {"0": "a", "1": "b", "2": "c", "3": "d"}])
def test_wrong_ones_are_refused_and_nothing_is_changed(classes: Any, tmp_path: Path) -> None:
    saved("lora", tmp_path)
    manifest = json.loads((tmp_path / "adapters.json").read_text())
    manifest["adapters"][0]["id2label"] = classes
    (tmp_path / "adapters.json").write_text(json.dumps(manifest))
    given = base(["a", "b"])
    before = Snapshot(given, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=str(tmp_path)):
        load_adapters(given, tmp_path)
    before.check()
    assert given.config.id2label == {0: "a", 1: "b"}


def test_folders_of_older_releases_name_none(tmp_path: Path) -> None:
    logits = saved("lora", tmp_path)
    manifest = json.loads((tmp_path / "adapters.json").read_text())
    del manifest["adapters"][0]["id2label"]
    (tmp_path / "adapters.json").write_text(json.dumps(manifest))
    model: Any = load_adapters(base(["dog", "cat", "cow"]), tmp_path)
    assert torch.equal(run(model, make_inputs("vit"))["logits"], logits)
    assert model.config.id2label == {0: "dog", 1: "cat", 2: "cow"}
    assert classes_of(model.peft_config["own"]) is None
