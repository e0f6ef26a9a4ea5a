"""Classes of a head that LoRA or tuned norms save as a whole: they come back, and go with the head."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import build, make_inputs
from helpers import Snapshot, run
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model

from register_adapter import (
    AdapterFileError,
    PositionConfig,
    RegisterConfig,
    compose,
    load_adapters,
    rename_adapter,
    save_adapters,
)
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
    assert classes_of(model.peft_config["own"]) == model.config.id2label


OTHERS: dict[str, Any] = {
    "a": (LoraConfig(target_modules=["q_proj", "query"], modules_to_save=["classifier"]), NAMES),
    "b": (LoraConfig(target_modules=["v_proj", "value"], modules_to_save=["classifier"]), list("pqrst")),
    "r": (RegisterConfig(modules_to_save=["classifier"]), ["one", "two", "three"]),
    "n": (LNTuningConfig(target_modules=["layernorm_before"], modules_to_save=["classifier"]), ["u", "v"]),
}
#: Adapters without a head: one of a method takes the place of those with one.
PLAIN: dict[str, Any] = {
    "a": LoraConfig(target_modules=["q_proj", "query"]),
    "r": RegisterConfig(),
    "n": LNTuningConfig(target_modules=["layernorm_before"]),
}


def several(own: list[str], folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with a head of each of ``OTHERS``, of which none is at work, and what each gives."""
    model, logits = compose(base(own), {f"plain_{name}": copy.deepcopy(config) for name, config in PLAIN.items()}), {}
    for name, (config, names) in OTHERS.items():
        one = compose(base(names), {name: copy.deepcopy(config)})
        torch.nn.init.normal_(one.get_base_model().classifier.modules_to_save[name].weight)  # type: ignore[union-attr, index]
        one.save_pretrained(folder / name)
        logits[name] = shown(one.eval())
        model = load_adapters(model, folder / name)
        model.set_adapter([f"plain_{name}" for name in PLAIN])
    return model, logits


def shown(model: Any) -> torch.Tensor:
    return run(model, make_inputs("vit"))["logits"]


def names_of(model: Any) -> list[str]:
    config = model.config
    assert config.label2id == {name: index for index, name in config.id2label.items()}
    return list(config.id2label.values())


def switch(model: Any, name: str) -> None:
    """Have one head at work."""
    model.set_adapter([f"plain_{other}" for other in PLAIN])
    model.set_adapter(name)


def alone(model: Any) -> torch.Tensor:
    with model.disable_adapter([f"plain_{name}" for name in PLAIN]):
        return shown(model)


@pytest.mark.parametrize("own", [["x", "y"], ["x", "y", "z"]], ids=len)
def test_several_heads_by_turns(own: list[str], tmp_path: Path) -> None:
    model, logits = several(own, tmp_path)
    plain = shown(base(own))
    for _ in "12":
        for name, (_, names) in OTHERS.items():
            switch(model, name)
            assert names_of(model) == names
            assert torch.equal(alone(model), logits[name])
            with contextlib.suppress(KeyError), model.disable_adapter():
                assert names_of(model) == own
                with model.disable_adapter(name):
                    assert names_of(model) == own
                    assert torch.equal(shown(model), plain)
                    raise KeyError  # as if a pass failed
            assert names_of(model) == names
    for active in ["b", None, "r"]:
        switch(model, active or "plain_a")
        model.save_pretrained(tmp_path / "all")
        for there in (own, ["k"], list("12345")):
            again: Any = load_adapters(base(there), tmp_path / "all")
            assert names_of(again) == (OTHERS[active][1] if active else there)
            for name, (_, names) in OTHERS.items():
                switch(again, name)
                assert names_of(again) == names
                assert torch.equal(alone(again), logits[name])
            rename_adapter(again, "n", "m")
            assert names_of(again) == OTHERS["n"][1]
            again.delete_adapter("m")
            assert names_of(again) == there
            switch(again, "r")
            assert names_of(again) == OTHERS["r"][1]
            assert list(again.unload().config.id2label.values()) == there


@pytest.mark.parametrize("config", [OTHERS["a"][0], OTHERS["r"][0]], ids=["lora", "registers"])
@pytest.mark.parametrize("at_work", ["a", "r"])
def test_a_new_head_beside_others_has_the_classes_of_the_base(at_work: str, config: Any, tmp_path: Path) -> None:
    model, _ = several(["x", "y", "z"], tmp_path)
    switch(model, at_work)
    model.add_adapter("new", copy.deepcopy(config))
    switch(model, "new")
    assert names_of(model) == ["x", "y", "z"]
    switch(model, "b")
    model.save_pretrained(tmp_path / "all")
    again: Any = load_adapters(base(["k"]), tmp_path / "all")
    switch(again, "new")
    assert names_of(again) == ["x", "y", "z"]


@pytest.mark.parametrize("own", [["x", "y"], ["x", "y", "z"]], ids=len)
def test_a_second_head_of_registers_has_the_classes_of_the_base(own: list[str], tmp_path: Path) -> None:
    get_peft_model(base(NAMES), copy.deepcopy(OTHERS["r"][0])).save_pretrained(tmp_path)
    model: Any = PeftModel.from_pretrained(base(own), tmp_path)
    assert names_of(model) == NAMES
    model.add_adapter("two", copy.deepcopy(OTHERS["r"][0]))
    model.set_adapter("two")
    assert names_of(model) == own
    assert shown(model).shape[-1] == len(own)
    model.set_adapter("default")
    assert names_of(model) == NAMES


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("own", [["dog", "cat", "cow"], ["a", "b"]], ids=["as many", "others"])
def test_a_head_that_is_merged_keeps_them(own: list[str], method: str, tmp_path: Path) -> None:
    logits = saved(method, tmp_path)
    model: Any = load_adapters(base(own), tmp_path)
    merged = model.merge_and_unload()
    assert torch.allclose(shown(merged), logits, atol=1e-5)
    assert names_of(merged) == NAMES
    assert names_of(compose(merged, {"registers": RegisterConfig()}).unload()) == NAMES


@pytest.mark.parametrize("when", ["disabled", "another is at work"])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_head_that_is_not_at_work_is_saved_with_them(method: str, when: str, tmp_path: Path) -> None:
    model = compose(base(NAMES), {"own": CONFIGS[method]})
    with model.disable_adapter() if when == "disabled" else contextlib.nullcontext():
        if when != "disabled":
            model.add_adapter("other", {"lora": PLAIN["a"], "norms": PLAIN["n"], "positions": PositionConfig()}[method])
            model.set_adapter("other")
        model.save_pretrained(tmp_path)
    again: Any = load_adapters(base(["dog", "cat", "cow"]), tmp_path)
    again.set_adapter("own")
    assert names_of(again) == NAMES


@pytest.mark.parametrize("name", ["a", "r"])
def test_names_that_are_given_meanwhile_stay_with_the_head(name: str, tmp_path: Path) -> None:
    model, _ = several(["x", "y", "z"], tmp_path)
    switch(model, name)
    model.config.id2label, model.config.label2id = dict(enumerate("789")), {"7": 0, "8": 1, "9": 2}
    rename_adapter(model, name, "renamed")
    assert names_of(model) == ["7", "8", "9"]
    model.save_pretrained(tmp_path / "all")
    again: Any = load_adapters(base(["k"]), tmp_path / "all")
    assert names_of(again) == ["7", "8", "9"]
    other = "r" if name == "a" else "a"
    switch(model, other)
    assert names_of(model) == OTHERS[other][1]
    switch(model, "renamed")
    assert names_of(model) == ["7", "8", "9"]


def test_a_folder_is_loaded_beside_a_head_whose_classes_somebody_has_named(tmp_path: Path) -> None:
    saved("lora", tmp_path / "a")
    names = list("pqrst")
    compose(base(names), {"b": OTHERS["b"][0], "r": RegisterConfig()}).save_pretrained(tmp_path / "b")
    model: Any = load_adapters(base(["x", "y"]), tmp_path / "a")
    model.config.id2label = dict(enumerate("789"))
    model.add_adapter("plain", PLAIN["a"])
    model.set_adapter("plain")
    assert names_of(load_adapters(model, tmp_path / "b")) == names


def test_copies_have_their_own_and_nothing_is_kept_alive(tmp_path: Path) -> None:
    saved("lora", tmp_path)
    model: Any = load_adapters(base(["x", "y"]), tmp_path)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        other.config.id2label = dict(enumerate("789"))
        other.save_pretrained(tmp_path / "again")
        assert names_of(load_adapters(base(["k"]), tmp_path / "again")) == ["7", "8", "9"]
    assert names_of(model) == NAMES
    assert list(copy.deepcopy(model).unload().config.id2label.values()) == ["x", "y"]
    kept = weakref.ref(model.get_base_model())
    attributes = set(vars(base(["x", "y"])))
    assert set(vars(copy.deepcopy(model).unload())) == attributes
    del model
    gc.collect()
    assert kept() is None


def test_a_refused_folder_leaves_the_classes_of_those_before_it(tmp_path: Path) -> None:
    model, _ = several(["x", "y"], tmp_path)
    model.save_pretrained(tmp_path / "all")
    manifest = json.loads((tmp_path / "all" / "adapters.json").read_text())
    entry = next(entry for entry in manifest["adapters"] if entry["name"] == "n")
    entry["id2label"] = {str(number): str(number) for number in range(7)}
    (tmp_path / "all" / "adapters.json").write_text(json.dumps(manifest))
    given = base(["k"])
    before = Snapshot(given, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match="do not fit"):
        load_adapters(given, tmp_path / "all")
    before.check()
    assert given.config.id2label == {0: "k"}


@pytest.mark.parametrize("head", ["a", "r", "n"])
@pytest.mark.parametrize("method", ["a", "r", "n"])
def test_an_adapter_is_deleted_beside_a_head_at_work(method: str, head: str) -> None:
    """The next one of its method, whose head is the same module, waits on; and others can be added beside it."""
    if method == head:
        pytest.skip("of one method")
    model = compose(base(NAMES), {"plain": PLAIN[method], "head": OTHERS[head][0]})
    model.add_adapter("waiting", OTHERS[method][0])
    model.eval()
    copies: Any = model.get_base_model().classifier.modules_to_save  # type: ignore[union-attr]
    for name, seed in (("head", 1), ("waiting", 2)):
        torch.nn.init.normal_(copies[name].weight, generator=torch.Generator().manual_seed(seed))
    with model.disable_adapter("plain"):
        logits = shown(model)
    model.delete_adapter("plain")
    assert (model.active_adapters, list(model.peft_config)) == (["head"], ["head", "waiting"])
    assert torch.equal(shown(model), logits)
    model.add_adapter("next", PLAIN[method])
    assert model.active_adapters == ["head"]
    trained = [key for key, value in model.named_parameters() if value.requires_grad]
    assert trained
    assert not [key for key in trained if ".waiting" in key or ".next" in key]
    model.delete_adapter("head")
    model.set_adapter("waiting")
    assert not torch.equal(shown(model), logits)


@pytest.mark.parametrize("method", ["a", "r", "n"])
def test_a_head_that_is_set_aside_is_frozen_until_it_is_at_work_again(method: str) -> None:
    """As PEFT freezes it, also where the one that comes has no head of its own: DDP waits for what trains."""
    model: Any = compose(base(NAMES), {"head": OTHERS[method][0]})
    model.add_adapter("plain", PLAIN[method])
    flags = {key: value.requires_grad for key, value in model.named_parameters()}
    assert any("modules_to_save" in key for key, value in flags.items() if value)
    model.set_adapter("plain")
    trained = [key for key, value in model.named_parameters() if value.requires_grad]
    assert trained
    assert all("plain" in key.split(".") for key in trained)
    model.set_adapter("head")
    assert {key: value.requires_grad for key, value in model.named_parameters()} == flags


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("head", ["a", "r", "n"])
@pytest.mark.parametrize("method", ["a", "r", "n"])
def test_one_that_waits_beside_the_same_head_is_loaded(method: str, head: str, trainable: bool, tmp_path: Path) -> None:
    """With none of its method at work: that was deleted, or is not selected."""
    if method == head:
        pytest.skip("of one method")
    model: Any = compose(base(NAMES), {"plain": PLAIN[method], "head": OTHERS[head][0]})
    model.add_adapter("waiting", OTHERS[method][0])
    for name, copied in model.get_base_model().classifier.modules_to_save.items():
        torch.nn.init.normal_(copied.weight, generator=torch.Generator().manual_seed(len(name)))
    save_adapters(model, tmp_path / "all")
    model.delete_adapter("plain")
    save_adapters(model, tmp_path / "two")
    logits = shown(model.eval())
    for folder, chosen in (("all", ["head", "waiting"]), ("two", None)):
        again = load_adapters(base(NAMES), tmp_path / folder, trainable, chosen).eval()
        assert again.active_adapters == ["head"]
        assert torch.equal(shown(again), logits)
        trained = [key for key, value in again.named_parameters() if value.requires_grad]
        assert bool(trained) == trainable
        assert not [key for key in trained if ".waiting" in key]
        for name in ("head", "waiting"):
            for key, value in again.named_parameters():
                if name in key.split("."):
                    assert torch.equal(value, model.get_parameter(key))


@pytest.mark.parametrize("head", ["a", "r", "n"])
def test_one_is_left_out_beside_another_of_its_method(head: str, tmp_path: Path) -> None:
    """The config names the base's classes while the head is, by its adapter's name."""
    config, names = OTHERS[head]
    model: Any = compose(base(names), {"head": config})
    model.base_model.model.config.id2label = dict(enumerate(name.upper() for name in names))
    save_adapters(model, tmp_path)
    model = load_adapters(base(["k"]), tmp_path).eval()
    model.add_adapter("waiting", PLAIN[head])
    for left_out in ("head", ["head", "waiting"]):
        with model.disable_adapter(left_out):
            assert model.config.id2label == {0: "k"}
            assert shown(model).shape[-1] == 1
        assert list(model.config.id2label.values()) == [name.upper() for name in names]


@pytest.mark.parametrize("head", ["a", "n"])
def test_others_are_merged_beside_a_head_that_waits(head: str) -> None:
    scales = IA3Config(target_modules=["k_proj", "key"], feedforward_modules=[])
    model: Any = compose(base(NAMES), {"plain": PLAIN[head], "scales": scales, "r": PLAIN["r"]})
    model.add_adapter("waiting", OTHERS[head][0])
    logits = shown(model.eval())
    merged = model.merge_and_unload()
    assert list(merged.peft_config) == ["r"]
    torch.testing.assert_close(shown(merged), logits)


@pytest.mark.parametrize("put_on", [lambda model, config: compose(model, {"own": config}), get_peft_model])
def test_names_given_to_the_head_of_registers_go_with_it(put_on: Any) -> None:
    given = base(NAMES)
    model = put_on(given, RegisterConfig(modules_to_save=["classifier"]))
    given.config.id2label = dict(enumerate("xyz"))
    model.delete_adapter(*model.peft_config)
    assert list(given.config.id2label.values()) == NAMES
