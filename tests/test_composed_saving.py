"""A composed model in the hands of what knows PEFT: transformers' Trainer, accelerate's loops, the Hub."""

from __future__ import annotations

import json
import re
import shutil
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from cases_base import BLOCKS, LABELS, WIDTH
from families import build, make_inputs
from helpers import assert_identical, run
from huggingface_hub import CommitOperationAdd, ModelCard, ModelCardData
from peft import LNTuningConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import ViTForImageClassification

from register_adapter import (
    AdapterFileError,
    ComposedPeftModel,
    HubAccessError,
    RegisterConfig,
    add_registers,
    compose,
    load_adapters,
)
from register_adapter.testbed import load_shipped
from register_adapter.towers import find_tower
from register_adapter.tuner.composed import folder as adapter_folder
from register_adapter.tuner.composed import tensors
from register_adapter.tuner.composed.card import write_card
from register_adapter.utils import hub as hub_files
from register_adapter.utils.adapter_file import read_tensors


def composed(seed: int = 0) -> ComposedPeftModel:
    base = build("vit-classifier")
    torch.manual_seed(seed)
    lora = LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)
    return compose(base, {"registers": RegisterConfig(init_std=1.0), "lora": lora})


class Items(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        inputs = make_inputs("vit-classifier")
        self.pixels = inputs["pixel_values"].repeat(4, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": index % 2}


def trainer(model: ComposedPeftModel, folder: Path, **options: Any) -> transformers.Trainer:
    given: dict[str, Any] = {"num_train_epochs": 2, "learning_rate": 1e-2, "save_strategy": "epoch", "seed": 0}
    given |= {"eval_strategy": "epoch", "report_to": [], "use_cpu": True, "disable_tqdm": True} | options
    arguments = transformers.TrainingArguments(output_dir=str(folder), per_device_train_batch_size=4, **given)
    return transformers.Trainer(model, arguments, train_dataset=Items(), eval_dataset=Items())


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.slow
def test_merged_layer_norms_are_not_saved_nor_loaded(tmp_path: Path) -> None:
    """PEFT has them and the base's change places: the file got the base's values."""
    norms = LNTuningConfig(target_modules=["layernorm_before"])
    model = compose(build("vit"), {"registers": RegisterConfig(), "norms": norms})
    for value in model.parameters():
        value.data += value.requires_grad
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    for ways in (
        lambda: model.save_pretrained(tmp_path / "merged"),
        lambda: model.load_adapter(tmp_path / "before", "norms"),
        lambda: model.load_adapter(tmp_path / "before" / "norms", "norms"),
    ):
        with pytest.raises(ValueError, match=r"'norms' are merged.*unmerge_adapter\(\)"):
            ways()
    assert not (tmp_path / "merged").exists()
    model.save_pretrained(tmp_path / "registers", selected_adapters=["registers"])
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "after")
    saved = [load_file(tmp_path / name / "norms" / "adapter_model.safetensors") for name in ("before", "after")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(value, saved[1][key]) for key, value in saved[0].items())


def test_the_trainer_saves_and_resumes_all_adapters(tmp_path: Path) -> None:
    whole = composed()
    trainer(whole, tmp_path).train()
    first = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    resumed = composed(seed=1)
    trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(first))
    expected, weights = trained(whole), trained(resumed)
    assert list(weights) == list(expected)
    assert any("lora" in name for name in weights)
    assert any("register" in name for name in weights)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_trainer_loads_the_best_of_all_adapters_at_the_end(tmp_path: Path) -> None:
    model = composed()
    # A step far too long: the first epoch's model is the best.
    run_ = trainer(
        model,
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=3.0,
        lr_scheduler_type="constant",
    )
    seen: list[dict[str, torch.Tensor]] = []

    class Keep(transformers.TrainerCallback):
        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(trained(model))

    run_.add_callback(Keep())
    with mock.patch.object(run_, "evaluate", side_effect=[{"eval_loss": 1.0}, {"eval_loss": 2.0}]):
        run_.train()
    weights = trained(model)
    assert set(weights) == set(seen[0])
    assert all(torch.equal(weights[name], seen[0][name]) for name in weights)
    assert any(not torch.equal(weights[name], seen[1][name]) for name in weights)


@pytest.mark.parametrize("name", ["is_main_process", "safe_serialization", "save_function", "max_shard_size", "state"])
def test_saving_takes_the_arguments_of_peft(name: str, tmp_path: Path) -> None:
    model = composed().eval()
    given: dict[str, Any] = {
        "is_main_process": {"is_main_process": True},
        "safe_serialization": {"safe_serialization": True},
        "save_function": {"save_function": torch.save},
        "max_shard_size": {"max_shard_size": "5GB"},
        "state": {"state_dict": {key: value * 2 for key, value in model.state_dict().items()}},
    }[name]
    model.save_pretrained(tmp_path, **given)
    state = load_adapters(build("vit-classifier"), tmp_path).state_dict()
    scale = 2 if name == "state" else 1
    own = [key for key in state if "lora_" in key or "register_adapter_tokens" in key]
    assert own
    assert all(torch.equal(state[key], model.state_dict()[key] * scale) for key in own)


def test_another_process_writes_nothing_and_what_is_not_offered_is_refused(tmp_path: Path) -> None:
    model, folder = composed(), tmp_path / "out"
    model.save_pretrained(folder, is_main_process=False)
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(folder, safe_serialization=False)
    with pytest.raises(ValueError, match="embedding"):
        model.save_pretrained(folder, save_embedding_layers=True)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        model.save_pretrained(folder, selected_adapters=["other"])
    assert not folder.exists()


def test_a_folder_of_several_gives_the_adapters_their_values_or_is_refused(tmp_path: Path) -> None:
    composed().save_pretrained(tmp_path)
    other = composed(seed=1)
    other.load_adapter(tmp_path, "registers")
    inputs = make_inputs("vit-classifier")
    assert_identical(run(other.eval(), inputs), run(composed().eval(), inputs))
    alone = compose(build("vit-classifier"), {"registers": RegisterConfig()})
    with pytest.raises(ValueError, match=r"holds the adapters \['lora'\], which the model lacks"):
        alone.load_adapter(tmp_path, "registers")


def test_an_adapter_takes_no_values_from_another_methods(tmp_path: Path) -> None:
    """PEFT reads nothing of such a folder, and says nothing, as of a checkpoint that a Trainer goes on from."""
    add_registers(build("vit-classifier")).save_pretrained(tmp_path / "alone")
    model = composed()
    with pytest.raises(AdapterFileError, match=r"of the method REGISTER_ADAPTER; the one .* is of LORA"):
        model.load_adapter(tmp_path / "alone", "lora")
    model.load_adapter(tmp_path / "alone", "registers")
    swapped = {"lora": RegisterConfig(), "registers": LoraConfig(target_modules=["q_proj", "query"])}
    compose(build("vit-classifier"), swapped).save_pretrained(tmp_path / "swapped")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match="Nothing was changed"):
        model.load_adapter(tmp_path / "swapped", "lora")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@dataclass
class Hub:
    folder: Path
    #: Name and revision of every file asked for.
    asked: list[tuple[str, Any]] = field(default_factory=list)
    client: mock.MagicMock = field(default_factory=mock.MagicMock)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A folder that stands for the Hub, to be pushed to and loaded from."""
    hub = Hub(tmp_path / "remote")

    def commit(_: str, operations: list[CommitOperationAdd], **kwargs: Any) -> str:
        for one in operations:
            place = hub.folder / one.path_in_repo
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(one.path_or_fileobj), place)
        return "done"

    hub.client.create_repo.return_value.repo_id = "me/pair"
    hub.client.create_commit.side_effect = commit
    monkeypatch.setattr(hub_files, "HfApi", mock.MagicMock(return_value=hub.client))
    library = transformers.utils.hub
    for name, made in (("hf_api", lambda: hub.client), ("create_repo", hub.client.create_repo)):
        if hasattr(library, name):
            monkeypatch.setattr(library, name, made)
    monkeypatch.setattr(
        library,
        "create_and_tag_model_card",
        lambda repo_id, tags=None, **_: ModelCard.from_template(ModelCardData(tags=list(tags or []))),
    )

    def fetch(name: str, filename: str, subfolder: str | None, options: dict[str, Any]) -> Path | None:
        hub.asked.append((name, options.get("revision")))
        path = hub.folder / (subfolder or "") / filename
        return path if path.is_file() else None

    monkeypatch.setattr(adapter_folder, "fetch", fetch)
    monkeypatch.setattr(hub_files, "fetch", fetch)
    return hub


def test_what_is_pushed_is_loaded_from_the_hub(remote: Hub) -> None:
    model = composed().eval()
    model.push_to_hub("me/pair")
    remote.asked.clear()
    loaded = load_adapters(build("vit-classifier"), "me/pair", revision="v1").eval()
    assert set(remote.asked) == {("me/pair", "v1")}
    inputs = make_inputs("vit-classifier")
    assert_identical(run(loaded, inputs), run(model, inputs))


@pytest.mark.parametrize("hub", [True, False])
def test_a_subfolder_is_loaded_and_not_what_lies_above_it(remote: Hub, hub: bool) -> None:
    composed().save_pretrained(remote.folder)
    model = composed(seed=1).eval()
    model.save_pretrained(remote.folder / "runs" / "b")
    place = "me/pair" if hub else remote.folder
    loaded = load_adapters(build("vit-classifier"), place, subfolder="runs/b").eval()
    inputs = make_inputs("vit-classifier")
    assert_identical(run(loaded, inputs), run(model, inputs))
    with pytest.raises(AdapterFileError, match="runs/c"):
        load_adapters(build("vit-classifier"), place, subfolder="runs/c")


def test_what_is_pushed_says_how_it_is_loaded_and_keeps_the_text_of_the_repository(remote: Hub) -> None:
    composed().push_to_hub("me/pair", tags=["mine"])
    text = (remote.folder / "README.md").read_text()
    assert 'load_adapters(base, "me/pair")' in text
    assert "\n- mine\n" in text
    (remote.folder / "README.md").write_text(f"{text}My text.\n")
    composed(seed=1).push_to_hub("me/pair")
    assert (remote.folder / "README.md").read_text().endswith("\nMy text.\n")


@pytest.mark.parametrize("shipped", [False, True])
def test_the_snippet_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    if not shipped:
        build("vit-classifier").save_pretrained("base")
    base = load_shipped("register-adapter://planted") if shipped else ViTForImageClassification.from_pretrained("base")
    lora = LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)
    adapters = {"registers": RegisterConfig(num_registers=2, init_std=1.0), "lora": lora}
    model = compose(base, adapters).eval()
    model.save_pretrained("out")
    (snippet,) = re.findall(r"```python\n(.*?)```", Path("out", "README.md").read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(snippet.replace("path/to/this/folder", "out"), scope)
    pixels = torch.randn(1, 3, base.config.image_size, base.config.image_size)
    assert torch.equal(scope["model"](pixel_values=pixels).logits, model(pixel_values=pixels).logits)


def test_a_push_that_is_answered_by_something_else_says_so_without_the_token(remote: Hub) -> None:
    token = "_".join(("hf", "secret"))
    remote.client.create_repo.side_effect = json.JSONDecodeError(f"You sent {token}", "<html>", 0)
    with pytest.raises(HubAccessError, match="not what the Hub answers") as caught:
        composed().push_to_hub("me/pair", token=f"{token}\n")
    assert token not in "".join(traceback.format_exception(caught.value))
    assert not remote.folder.exists()


def test_a_folder_on_the_hub_without_a_manifest_is_refused(remote: Hub) -> None:
    composed().push_to_hub("me/pair")
    (remote.folder / "adapters.json").unlink()
    with pytest.raises(AdapterFileError, match="one adapter is loaded with PeftModel"):
        load_adapters(build("vit-classifier"), "me/pair")


def test_the_card_says_how_to_load_the_folder_and_keeps_the_users_text(tmp_path: Path) -> None:
    composed().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "load_adapters" in text
    assert "register-adapter" in text
    (tmp_path / "README.md").write_text("---\ntags: mine\n---\nmy text\n")
    composed().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "my text" in text
    assert "mine" in text
    assert "load_adapters" not in text
    assert json.loads((tmp_path / "adapters.json").read_text())["adapters"]


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ("checkpoint-9", '"checkpoint-9")  # a local folder: put its path here, or the name of this repository'),
        ("me/pair", '"me/pair")'),
        (None, '"path/to/this/folder")'),
    ],
)
def test_the_card_says_where_a_path_belongs_as_that_of_one_adapter_does(
    adapter: str | None, line: str, tmp_path: Path
) -> None:
    configs: dict[str, PeftConfig] = {"registers": RegisterConfig(), "lora": LoraConfig()}
    write_card(tmp_path / "README.md", configs, ViTForImageClassification, "base", adapter=adapter)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert f"model = register_adapter.load_adapters(base, {line}" in lines


def test_the_card_says_what_the_registers_are_and_which_classes_a_head_has(tmp_path: Path) -> None:
    names = {number: f"kind {number}" for number in range(LABELS)}
    config = RegisterConfig(num_registers=2, deep=True, gate=-1.0, modules_to_save=["classifier"], id2label=names)
    base = build("vit-classifier")
    compose(base, {"regs": config, "lora": LoraConfig(target_modules=["query", "q_proj"])}).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for line in (
        "REGISTER_ADAPTER: learned tokens, fresh ones at every block",
        f"| `regs`: Registers | 2 × {WIDTH} in each of {BLOCKS} blocks |",
        "| `regs`: Gate | a bias on the attention to registers, made as -1 |",
        "| `regs`: Saved as a whole beside them | `classifier` |",
        f"| `regs`: Classes of the head | {LABELS}: `kind 0`, ",
        "weights have another fingerprint, is refused.",
    ):
        assert line in text


def test_a_register_adapter_is_saved_with_the_values_that_are_given(tmp_path: Path) -> None:
    model = add_registers(build("vit-classifier"), modules_to_save=["classifier"])
    given = {key: torch.full_like(value, 0.5) for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given)
    saved = read_tensors(tmp_path / "adapter_model.safetensors")
    assert any("registers" in key for key in saved)
    assert all(bool((value == 0.5).all()) for value in saved.values())


def test_two_threads_save_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sees the other in the middle of it, and the model keeps all its adapters."""
    model, both, plain = composed().eval(), threading.Barrier(2), tensors.get_peft_model_state_dict

    def meet(*args: Any, **kwargs: Any) -> Any:
        both.wait(timeout=30)
        tensors = plain(*args, **kwargs)
        both.wait(timeout=30)
        return tensors

    expected, names = run(model, make_inputs("vit-classifier")), list(model.peft_config)
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(tensors, "get_peft_model_state_dict", meet)
        list(pool.map(model.save_pretrained, (tmp_path / "one", tmp_path / "two")))
    assert list(model.peft_config) == names
    for folder in ("one", "two"):
        loaded = load_adapters(build("vit-classifier"), tmp_path / folder).eval()
        assert_identical(run(loaded, make_inputs("vit-classifier")), expected)


# Modules that torch wraps: their names have its words in them, the keys of the state have not


def in_blocks(seed: int, several: bool) -> PeftModel:
    """Registers with a saved module in every block, alone or beside LoRA there."""
    registers = RegisterConfig(num_registers=2, register_neurons={1: [3]}, modules_to_save=["layernorm_before"])
    base = build("vit-classifier")
    torch.manual_seed(seed)
    lora = LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)
    model = compose(base, {"registers": registers, "lora": lora}) if several else get_peft_model(base, registers)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value), alpha=0.2)
    return model.eval()


def wrap_blocks(model: torch.nn.Module) -> None:
    kind = type(find_tower(model).part("blocks")[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))


def wrap_tower(model: torch.nn.Module) -> None:
    kind = type(find_tower(model).module)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))


@pytest.mark.parametrize("several", [True, False], ids=["composed", "registers"])
@pytest.mark.parametrize("wrap", [wrap_blocks, wrap_tower])
def test_what_is_saved_of_wrapped_modules_loads_on_a_plain_base_and_on_a_wrapped_one(
    wrap: Any, several: bool, tmp_path: Path
) -> None:
    inputs, model, other = make_inputs("vit-classifier"), in_blocks(0, several), in_blocks(1, several)
    expected = run(model, inputs)
    wrap(model)
    model.save_pretrained(str(tmp_path))
    load = load_adapters if several else PeftModel.from_pretrained
    assert_identical(run(load(build("vit-classifier"), tmp_path).eval(), inputs), expected)
    wrap(other)
    other.load_adapter(str(tmp_path), "registers" if several else "default")
    assert_identical(run(other, inputs), expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_every_adapter_is_saved_from_a_model_in_shards_of_blocks(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    inputs, model = make_inputs("vit-classifier"), composed().eval()
    expected = run(model, inputs)
    policy = ModuleWrapPolicy({type(find_tower(model).part("blocks")[0])})
    store = tmp_path / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        sharded: Any = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
        model.save_pretrained(tmp_path / "saved", state_dict=sharded.state_dict())
    finally:
        torch.distributed.destroy_process_group()
    assert_identical(run(load_adapters(build("vit-classifier"), tmp_path / "saved").eval(), inputs), expected)
