"""Registers beside other PEFT methods: both train, both are saved and loaded, and each can be switched alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import Snapshot, assert_identical, differs, hooks, run
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from processes import run_script
from safetensors.torch import save_file
from torch import nn

from register_adapter import (
    Anatomy,
    ComposedPeftModel,
    PositionConfig,
    RegisterConfig,
    add_registers,
    compose,
    load_adapters,
    save_adapters,
)
from register_adapter.tuner.composed import folder as adapter_folder
from register_adapter.utils.adapter_file import read_tensors

#: Configs whose adapters are not at their neutral initial values, so that every one of them changes the output.
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(target_modules=["q_proj", "v_proj", "query", "value"], init_lora_weights=False),
    "dora": lambda: LoraConfig(target_modules=["q_proj", "query"], use_dora=True, init_lora_weights=False),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "key"], feedforward_modules=[], init_ia3_weights=False),
    "vera": lambda: VeraConfig(target_modules=["q_proj", "v_proj", "query", "value"], r=4, init_weights=False),
    "oft": lambda: OFTConfig(target_modules=["q_proj", "query"], oft_block_size=4, init_weights=False),
    # The final norm is where registers leave a ViT: PEFT makes copies of it.
    "layer-norm": lambda: LNTuningConfig(target_modules=["layernorm_before", "layernorm"]),
}
ORDERS = {"registers first": 1, "registers last": -1}
MODELS = ("vit-classifier", "clip-vision", "dinov2")


def registers(**options: Any) -> RegisterConfig:
    return RegisterConfig(**{"num_registers": 4, "init_std": 1.0, **options})


def pair(method: str = "lora", order: int = 1, base: str | nn.Module = "vit-classifier", **options: Any) -> Any:
    configs = [("registers", registers(**options)), ("other", METHODS[method]())]
    model = compose(build(base) if isinstance(base, str) else base, dict(configs[::order]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_tuning" in name:  # a copy of the base's at first
                parameter += torch.randn_like(parameter)
    return model.eval()


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# One folder


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_pair_is_saved_and_loaded_bit_for_bit(method: str, order: int, tmp_path: Path) -> None:
    model, inputs = pair(method, order), make_inputs("vit-classifier")
    expected = run(model, inputs)
    with model.disable_adapter("registers"):
        assert differs(run(model, inputs), expected)
    with model.disable_adapter("other"):
        assert differs(run(model, inputs), expected)
    save_adapters(model, tmp_path)
    loaded = load_adapters(build("vit-classifier"), tmp_path)
    assert_identical(run(loaded, inputs), expected)
    assert not trainable(loaded)
    assert not loaded.training
    assert set(loaded.active_adapters) == {"registers", "other"}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_loads_a_pair(name: str, order: int, tmp_path: Path) -> None:
    model, inputs = pair("lora", order, name), make_inputs(name)
    model.save_pretrained(tmp_path)
    loaded = ComposedPeftModel.from_pretrained(build(name), tmp_path, is_trainable=True)
    assert_identical(run(loaded.eval(), inputs), run(model, inputs))
    assert sorted(trainable(loaded)) == sorted(trainable(model))


@pytest.mark.slow
def test_a_pair_is_loaded_in_another_process(tmp_path: Path) -> None:
    inputs, base = make_inputs("vit-classifier"), build("vit-classifier")
    base.save_pretrained(tmp_path / "base")
    for order in ORDERS.values():
        model = pair("lora", order)
        save_adapters(model, tmp_path / str(order))
        torch.save({"inputs": inputs, "outputs": run(model, inputs)}, tmp_path / f"{order}.pt")
    assert run_script("load_pairs", tmp_path, *ORDERS.values()).stdout.split() == ["identical"]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_copied_final_norm_has_no_hooks_of_its_own(order: int) -> None:
    """Hooks in a copy would be bound to a copy of the registers, and cut tokens a second time."""
    model, inputs = pair("layer-norm", order, "vit"), make_inputs("vit")
    assert not hooks(model.get_base_model().layernorm.ln_tuning_layers)
    assert run(model, inputs)["last_hidden_state"].shape == run(build("vit"), inputs)["last_hidden_state"].shape


def test_each_subfolder_is_an_adapter_of_peft(tmp_path: Path) -> None:
    model, inputs = pair(), make_inputs("vit-classifier")
    save_adapters(model, tmp_path)
    for name, other in (("registers", "other"), ("other", "registers")):
        alone = PeftModel.from_pretrained(build("vit-classifier"), str(tmp_path / name))
        with model.disable_adapter(other):
            assert_identical(run(alone, inputs), run(model, inputs))


def test_some_adapters_are_saved_and_some_loaded(tmp_path: Path) -> None:
    model, inputs = pair(), make_inputs("vit-classifier")
    save_adapters(model, tmp_path / "one", selected_adapters=["other"])
    assert [path.name for path in (tmp_path / "one").iterdir() if path.is_dir()] == ["other"]
    save_adapters(model, tmp_path / "both")
    loaded = load_adapters(build("vit-classifier"), tmp_path / "both", selected_adapters=["registers"])
    with model.disable_adapter("other"):
        expected = run(model, inputs)
    assert_identical(run(loaded, inputs), expected)
    both = load_adapters(loaded, tmp_path / "one")
    assert_identical(run(both, inputs), run(model, inputs))


def _plain() -> Any:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
            self.fc = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attn(x, x, x)[0]
            return x + self.fc(x)

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(3, 16, 8, 8)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.proj(pixels).flatten(2).transpose(1, 2)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks, self.norm = Embed(), nn.ModuleList([Block(), Block()]), nn.LayerNorm(16)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            x = self.embed(pixel_values)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    torch.manual_seed(0)
    return Plain().eval().requires_grad_(False)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_plain_module_carries_a_pair(order: int, tmp_path: Path) -> None:
    anatomy = Anatomy(
        "plain",
        embeddings="embed",
        remove="norm",
        blocks="blocks",
        prefix=0,
        hidden_size=16,
        attention="attn",
        patch_embedding="embed.proj",
        position_embedding=None,
        cls_token=None,
        final_norm="norm",
        input_shape=(3, 32, 32),
    )
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    lora = LoraConfig(target_modules=["fc"], init_lora_weights=False)
    configs = [("registers", registers(anatomy=anatomy)), ("lora", lora)]
    model = compose(_plain(), dict(configs[::order])).eval()
    save_adapters(model, tmp_path)
    assert_identical(run(load_adapters(_plain(), tmp_path), inputs), run(model, inputs))
    assert differs(run(model, inputs), run(_plain(), inputs))


# Training


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_both_and_the_head_and_nothing_else(method: str, order: int) -> None:
    model = pair(method, order, modules_to_save=["classifier"]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**make_inputs("vit-classifier")).logits.square().sum().backward()
    optimiser.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(trainable(model))
    assert any(".registers." not in name for name in moved)
    assert any("modules_to_save.registers" in name for name in moved)
    assert any(".register_adapter_tokens." in name for name in moved)


def test_a_head_is_saved_with_its_adapter(tmp_path: Path) -> None:
    model, inputs = pair(modules_to_save=["classifier"]), make_inputs("vit-classifier")
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["registers"].weight += 1
    save_adapters(model, tmp_path)
    expected = run(model, inputs)
    assert_identical(run(load_adapters(build("vit-classifier"), tmp_path), inputs), expected)
    merged = model.merge_and_unload()
    assert_identical_nearly(run(merged, inputs), expected)
    save_adapters(merged, tmp_path / "merged")
    saved = read_tensors(tmp_path / "merged" / "registers" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.classifier.weight"], build("vit-classifier").classifier.weight + 1)


# Switching


@pytest.mark.parametrize("method", METHODS)
def test_disable_adapter_acts_on_what_is_named(method: str) -> None:
    model, inputs = pair(method), make_inputs("vit-classifier")
    flags, both, plain = trainable(model), run(model, inputs), run(build("vit-classifier"), inputs)
    with model.disable_adapter():
        assert_identical(run(model, inputs), plain)
    with model.disable_adapter("registers"):
        without_registers = run(model, inputs)
        assert trainable(model) == flags
        with model.disable_adapter("other"):
            assert_identical(run(model, inputs), plain)
        assert_identical(run(model, inputs), without_registers)
    without_other = run_and_fail(model, inputs)
    assert_identical(run(model, inputs), both)
    assert trainable(model) == flags
    assert all(differs(left, right) for left, right in ((without_registers, without_other), (without_other, plain)))


def run_and_fail(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The outputs without "other", from a context that an exception leaves."""
    try:
        with model.disable_adapter(["other"]):
            outputs = run(model, inputs)
            raise ZeroDivisionError
    except ZeroDivisionError:
        return outputs


def test_set_adapter_leaves_other_methods_alone() -> None:
    model, inputs = pair(), make_inputs("vit-classifier")
    first = run(model, inputs)
    model.add_adapter("second", METHODS["lora"]())
    assert_identical(run(model, inputs), first)
    assert model.active_adapters == ["registers", "other"]
    model.set_adapter("second")
    assert model.active_adapters == ["registers", "second"]
    assert differs(run(model, inputs), first)
    assert all(".other." not in name for name in trainable(model))
    assert any("register_adapter_tokens" in name for name in trainable(model))
    model.set_adapter(["registers", "other"])
    assert_identical(run(model, inputs), first)
    with pytest.raises(ValueError, match=r"no adapter 'third'; the model has \['registers', 'other', 'second'\]"):
        model.set_adapter("third")


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.set_adapter("second"),
        lambda part: part.set_adapter(["registers", "other", "second"]),
        lambda part: part.delete_adapter("other"),
        lambda part: part.delete_adapter("registers"),
    ],
    ids=["one", "several", "delete", "delete registers"],
)
def test_the_tuner_switches_and_deletes_as_the_model_does(change: Callable[[Any], None]) -> None:
    """``model.base_model.set_adapter`` is how users of PEFT make several adapters active."""
    states: list[Any] = []
    for part in ("itself", "base_model"):
        torch.manual_seed(0)
        model = pair()
        model.add_adapter("second", METHODS["lora"]())
        change(model if part == "itself" else model.base_model)
        states.append(
            (model.active_adapters, [*model.peft_config], trainable(model), run(model, make_inputs("vit-classifier")))
        )
    assert states[0][:3] == states[1][:3]
    assert_identical(states[1][3], states[0][3])


# Merging and taking off


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("method", METHODS)
def test_merging_keeps_registers(method: str, order: int, tmp_path: Path) -> None:
    model, inputs = pair(method, order), make_inputs("vit-classifier")
    expected = run(model, inputs)
    merged = model.merge_and_unload()
    assert list(merged.peft_config) == ["registers"]
    assert_identical_nearly(run(merged, inputs), expected)
    save_adapters(merged, tmp_path)
    remaining = [type(layer).__name__ for layer in merged.modules() if isinstance(layer, BaseTunerLayer)]
    assert remaining == ["RegisterLayer"]
    again = ComposedPeftModel(merged)
    again.delete_adapter("registers")
    assert differs(run(again, inputs), expected)


@pytest.mark.parametrize("heads", [None, ["classifier"]], ids=["no-head", "head"])
@pytest.mark.parametrize("method", METHODS)
def test_what_was_merged_is_saved_in_two_parts(method: str, heads: list[str] | None, tmp_path: Path) -> None:
    """As docs/composition.md has it: each part alone gives other outputs."""
    model, inputs = pair(method, modules_to_save=heads), make_inputs("vit-classifier")
    expected = run(model, inputs)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "base")
    save_adapters(merged, tmp_path / "registers")
    base, said = type(merged).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert any("register_adapter_tokens" in key for key in said["unexpected_keys"])
    assert differs(run(base.eval(), inputs), expected)
    assert_identical_nearly(run(load_adapters(base, tmp_path / "registers"), inputs), expected)


def assert_identical_nearly(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=0)


def test_a_peft_models_own_merge_keeps_the_registers_at_work() -> None:
    base, inputs = build("vit-classifier"), make_inputs("vit-classifier")
    base.add_adapter(registers(), "registers")
    model = get_peft_model(base, METHODS["lora"](), "lora").eval()
    expected = run(model, inputs)
    assert_identical_nearly(run(model.merge_and_unload(), inputs), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gone", ["registers", "other"])
def test_one_method_is_taken_off_and_the_other_stays(method: str, gone: str) -> None:
    model, inputs = pair(method), make_inputs("vit-classifier")
    with model.disable_adapter(gone):
        expected = run(model, inputs)
    model.delete_adapter(gone)
    assert_identical(run(model, inputs), expected)
    assert len(model.active_adapters) == 1
    layers = {type(layer).__name__ == "RegisterLayer" for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
    assert layers == {gone == "other"}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("method", METHODS)
def test_unload_gives_back_the_base(method: str, order: int) -> None:
    base = build("vit-classifier")
    snapshot = Snapshot(base, make_inputs("vit-classifier"))
    assert pair(method, order, base, modules_to_save=["classifier"]).unload() is base
    snapshot.check()


def test_registers_alone_cannot_be_merged() -> None:
    with pytest.raises(NotImplementedError, match="not weight deltas"):
        compose(build("vit"), {"registers": registers()}).merge_and_unload()
    with pytest.raises(NotImplementedError, match="not weight deltas"):
        pair().merge_and_unload(adapter_names=["registers"])


# Other ways to the same model


def _by_transformers(base: Any) -> Any:
    base.add_adapter(registers(), "registers")
    return get_peft_model(base, METHODS["lora"](), "other")


def _wrapped_twice(base: Any) -> Any:
    return get_peft_model(add_registers(base, adapter_name="registers"), METHODS["lora"](), "other")


def _registers_last(base: Any) -> Any:
    return compose(get_peft_model(base, METHODS["lora"](), "other"), {"registers": registers()})


def _registers_first(base: Any) -> Any:
    return compose(add_registers(base, adapter_name="registers"), {"other": METHODS["lora"]()})


def _mixed(base: Any) -> Any:
    return compose(get_peft_model(base, METHODS["lora"](), "other", mixed=True), {"registers": registers()})


@pytest.mark.parametrize("build_pair", [_by_transformers, _wrapped_twice, _registers_last, _registers_first, _mixed])
def test_models_composed_in_other_ways_are_saved_and_loaded(build_pair: Callable[[Any], Any], tmp_path: Path) -> None:
    model, inputs = build_pair(build("vit-classifier")).eval(), make_inputs("vit-classifier")
    save_adapters(model, tmp_path)
    loaded = load_adapters(build("vit-classifier"), tmp_path)
    assert_identical(run(loaded, inputs), run(model, inputs))
    assert {"registers", "other"} == set(loaded.active_adapters)


def test_an_inactive_adapter_is_loaded_inactive(tmp_path: Path) -> None:
    """transformers' add_adapter leaves the new adapter as the only active one, of whatever method."""
    base, inputs = build("vit-classifier"), make_inputs("vit-classifier")
    base.add_adapter(METHODS["lora"](), "lora")
    base.add_adapter(registers(), "registers")
    save_adapters(base, tmp_path)
    loaded = load_adapters(build("vit-classifier"), tmp_path)
    assert loaded.active_adapters == ["registers"]
    assert_identical(run(loaded, inputs), run(base.eval(), inputs))
    loaded.set_adapter("lora")
    assert set(loaded.active_adapters) == {"registers", "lora"}


def test_three_methods_and_a_second_round() -> None:
    model, inputs = pair("lora"), make_inputs("vit-classifier")
    grown = compose(model, {"scales": METHODS["ia3"]()}).eval()
    assert grown.active_adapters == ["registers", "other", "scales"]
    assert {"lora_A" in name for name in trainable(grown)} == {True, False}
    with grown.disable_adapter("scales"):
        with_two = run(grown, inputs)
    grown.delete_adapter("scales")
    assert_identical(run(grown, inputs), with_two)


# What is refused


#: Where the blocks of a ViT are, in this transformers.
BLOCKS_PATH = next(name for name, part in build("vit-classifier").named_modules() if isinstance(part, nn.ModuleList))
REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a bad name": (lambda: {"a.b": registers()}, "letters, digits"),
    "no config": (lambda: {"a": {"r": 4}}, "expected a config of PEFT"),
    "prompt learning": (
        lambda: {"r": registers(), "p": PrefixTuningConfig(num_virtual_tokens=2)},
        "PREFIX_TUNING.*cannot be composed",
    ),
    "one head for two": (
        lambda: {
            "r": registers(modules_to_save=["classifier"]),
            "l": LoraConfig(target_modules=["q_proj", "query"], modules_to_save=["classifier"]),
        },
        "both have 'classifier' in modules_to_save",
    ),
    "no such target": (lambda: {"r": registers(), "l": LoraConfig(target_modules=["nowhere"])}, "(?i)target.?modules"),
    "no such head": (lambda: {"l": METHODS["lora"](), "r": registers(modules_to_save=["nowhere"])}, "nowhere"),
    "token indices": (
        lambda: {"l": LoraConfig(target_modules=["q_proj", "query"], trainable_token_indices=[1]), "r": registers()},
        "'l' has trainable_token_indices: .*TrainableTokensConfig",
    ),
    "a layer in another's head": (
        lambda: {
            "r": registers(modules_to_save=["classifier"]),
            "l": LoraConfig(target_modules=r".*(q_proj|query|original_module|modules_to_save\.r)"),
        },
        "'l' has a layer on 'classifier', and the adapter 'r' trains and saves 'classifier' as a whole",
    ),
    "another's layers in a block": (
        lambda: {"l": METHODS["lora"](), "r": registers(modules_to_save=[f"{BLOCKS_PATH}.1"])},
        f"'l' has a layer on '{BLOCKS_PATH}.1.*', and the adapter 'r' trains and saves '{BLOCKS_PATH}.1' as a whole",
    ),
    "one target for two": (
        lambda: {
            "l": METHODS["lora"](),
            "r": registers(),
            "i": IA3Config(target_modules=["q_proj", "query"], feedforward_modules=[]),
        },
        "wraps already: stacked",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_composed_leaves_the_model_as_it_was(case: str) -> None:
    configs, message = REFUSED[case]
    base = build("vit-classifier").requires_grad_(True)
    snapshot = Snapshot(base, make_inputs("vit-classifier"))
    with pytest.raises((ValueError, TypeError), match=message):
        compose(base, configs())
    snapshot.check()


@pytest.mark.parametrize("by", ["compose", "add_adapter"])
def test_all_linear_layers_are_those_outside_of_a_trained_head(by: str, tmp_path: Path) -> None:
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    base, inputs = build("vit-classifier"), make_inputs("vit-classifier")
    heads = {"r": registers(modules_to_save=["classifier"])}
    model = compose(base, {**heads, "l": config} if by == "compose" else heads)
    if by == "add_adapter":
        model.add_adapter("l", config)
    assert not any("lora" in name for name, _ in base.classifier.named_modules())
    model.eval().save_pretrained(tmp_path)
    assert_identical(run(load_adapters(build("vit-classifier"), tmp_path).eval(), inputs), run(model, inputs))


def test_layers_in_a_trained_block_are_refused_by_name_also_without_compose(tmp_path: Path) -> None:
    config, message = registers(modules_to_save=[f"{BLOCKS_PATH}.1"]), "as a whole .modules_to_save.: what is saved"
    base = get_peft_model(build("vit-classifier"), METHODS["lora"](), "l").get_base_model()
    snapshot = Snapshot(base, make_inputs("vit-classifier"))
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config, "r")
    snapshot.check()
    base = build("vit-classifier")
    base.add_adapter(config, "r")
    model = get_peft_model(base, METHODS["lora"](), "l")
    with pytest.raises(ValueError, match=message):
        save_adapters(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_refused_method_leaves_the_others_at_work() -> None:
    model, inputs = pair(), make_inputs("vit-classifier")
    expected, flags, hooked = run(model, inputs), trainable(model), hooks(model)
    for name, config, message in (
        ("more", IA3Config(target_modules=["nowhere"], feedforward_modules=[]), "(?i)target.?modules"),
        ("other", METHODS["lora"](), "has an adapter 'other' already"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_adapter(name, config)
        with pytest.raises(ValueError, match=message):
            compose(model, {name: config})
        assert_identical(run(model, inputs), expected)
        assert (trainable(model), hooks(model), list(model.peft_config)) == (flags, hooked, ["registers", "other"])


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["fc1", "dense", "k_proj", "key"]),
        LoraConfig(target_modules=["fc1", "dense", "layernorm"]),
        IA3Config(target_modules=["q_proj", "query", "fc2"], feedforward_modules=[]),
    ],
    ids=["on another's layer", "half way", "a first one of its method, half way"],
)
def test_a_refused_adapter_leaves_the_chosen_ones_of_its_method(config: Any) -> None:
    scales = VeraConfig(target_modules=["k_proj", "key"], r=4, init_weights=False)
    model = compose(build("vit-classifier"), {"l": METHODS["lora"](), "r": registers(), "scales": scales})
    model.add_adapter("later", METHODS["lora"]())
    model.set_adapter("later")
    snapshot, active = Snapshot(model.eval(), make_inputs("vit-classifier")), model.active_adapters
    with pytest.raises(ValueError, match=r"wraps already: stacked|is not supported"):
        model.add_adapter("refused", config)
    snapshot.check()
    assert model.active_adapters == active
    assert list(model.peft_config) == ["l", "r", "scales", "later"]


def test_two_adapters_of_one_head_are_active_in_turn() -> None:
    model, inputs = pair(modules_to_save=["classifier"]), make_inputs("vit-classifier")
    model.add_adapter("more", registers(modules_to_save=["classifier"]))
    expected, flags = run(model, inputs), trainable(model)
    with pytest.raises(ValueError, match="'registers' and 'more' both have 'classifier' in modules_to_save"):
        model.set_adapter(["registers", "more"])
    assert_identical(run(model, inputs), expected)
    assert trainable(model) == flags
    model.set_adapter("more")
    assert {name.split(".")[-2] for name in trainable(model) if "modules_to_save" in name} == {"more"}


def test_two_adapters_of_one_name_are_refused(tmp_path: Path) -> None:
    """PEFT's second "default" takes the place of the first one's config."""
    model = get_peft_model(add_registers(build("vit")), METHODS["lora"]())
    with pytest.raises(ValueError, match=r"RegisterLayer holds the adapter 'default'.*compose\("):
        save_adapters(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_peft_refuses_registers_in_its_mixed_model_before_this_package_is_asked() -> None:
    base = build("vit")
    snapshot = Snapshot(base, make_inputs("vit"))
    with pytest.raises(ValueError, match="REGISTER_ADAPTER' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base, registers(), mixed=True)
    snapshot.check()


def test_a_batch_without_adapters_is_the_bases() -> None:
    model, inputs = pair(modules_to_save=["classifier"]), make_inputs("vit-classifier")
    assert_identical(run(model, inputs, adapter_names=["__base__"] * 2), run(build("vit-classifier"), inputs))
    for names, mode, message in (
        (["__base__"], False, "1 names for a batch of 2"),
        (["__base__"] * 2, True, "training"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model.train(mode), inputs, adapter_names=names)


@pytest.mark.parametrize("name", ["registers", "other"])
def test_a_pass_that_fails_leaves_no_adapter_names_behind(name: str) -> None:
    """PEFT left its hooks on LoRA's layers: further batches of as many images had the names of the one that failed."""
    model, inputs = pair(), make_inputs("vit-classifier")
    expected, before = run(model, inputs), hooks(model)
    with pytest.raises(ValueError, match="channel dimension"):
        run(model, {"pixel_values": inputs["pixel_values"][:, :2]}, adapter_names=[name, "__base__"])
    assert hooks(model) == before
    assert_identical(run(model, inputs), expected)


def test_adapter_names_of_several_methods_in_one_batch_are_refused() -> None:
    model, inputs = pair(), make_inputs("vit-classifier")
    with pytest.raises(ValueError, match="must be of one method"):
        model(**inputs, adapter_names=["registers", "other"])
    with pytest.raises(ValueError, match=r"Trying to infer with non-existing adapter\(s\): 'nobody'; the model has"):
        model(**inputs, adapter_names=["nobody", "other"])
    mixed = run(model, inputs, adapter_names=["other", "__base__"])["logits"]
    both = run(model, inputs)["logits"]
    with model.disable_adapter("other"):
        alone = run(model, inputs)["logits"]
    torch.testing.assert_close(mixed, torch.stack([both[0], alone[1]]), atol=1e-6, rtol=0)


# Damaged folders


def _manifest(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        path = folder / "adapters.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(change(values) or values))

    return damage


def _truncate(folder: Path) -> None:
    path = folder / "other" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _of_another_save(folder: Path) -> None:
    save_adapters(pair(), folder / "again", selected_adapters=["other"])
    shutil.copy(folder / "again" / "other" / "adapter_model.safetensors", folder / "other")


def _without_a_tensor(folder: Path) -> None:
    path = folder / "other" / "adapter_model.safetensors"
    tensors = read_tensors(path)
    tensors.popitem()
    save_file(tensors, path)
    manifest = json.loads((folder / "adapters.json").read_text())
    entry = next(adapter for adapter in manifest["adapters"] if adapter["name"] == "other")
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "adapters.json").write_text(json.dumps(manifest))


def _of_kind(dtype: torch.dtype) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        path = folder / "other" / "adapter_model.safetensors"
        save_file({key: tensor.to(dtype) for key, tensor in read_tensors(path).items()}, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        _manifest(lambda values: values["adapters"][1].update(sha256=digest))(folder)

    return damage


def _of_another_width(folder: Path) -> None:
    path = folder / "other" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 3}))
    _manifest(lambda values: [entry.pop("config_sha256") for entry in values["adapters"]] and None)(folder)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda folder: (folder / "adapters.json").unlink(), "no adapters.json"),
    "no JSON": (lambda folder: (folder / "adapters.json").write_text("{"), "not a manifest"),
    "no object": (_manifest(lambda values: [1]), "not a manifest"),
    "of no format": (_manifest(lambda values: values.update(format_version=0)), "format 0, which there is not"),
    "newer": (_manifest(lambda values: values.update(format_version=2)), "format 2.*Upgrade"),
    "empty": (_manifest(lambda values: values.update(adapters=[])), "lists no adapters"),
    "twice": (_manifest(lambda values: values["adapters"].append(values["adapters"][0])), "one twice"),
    "outside": (_manifest(lambda values: values["adapters"][0].update(name="../x")), "not a manifest.*letters"),
    "method": (_manifest(lambda values: values["adapters"][1].update(method="IA3")), "'IA3' in /.*adapter_config"),
    "unknown method": (_manifest(lambda values: values["adapters"][1].update(method="X")), "this peft knows"),
    "no weights": (
        lambda folder: (folder / "other" / "adapter_model.safetensors").unlink(),
        "'other'.*has no adapter_m",
    ),
    "no config": (lambda folder: (folder / "registers" / "adapter_config.json").unlink(), "'registers'.*no adapter_c"),
    "no folder": (lambda folder: shutil.rmtree(folder / "other"), "'other'.*has no adapter_config.json and no"),
    "truncated": (_truncate, "damaged, or of another save"),
    "half a save": (_of_another_save, "damaged, or of another save"),
    "no tensor": (_without_a_tensor, "do not fit ViTForImageClassification: missing.*lora_"),
    "does not fit": (_of_another_width, "do not fit ViTForImageClassification[^\\n]*size mismatch[^\\n]*$"),
    "complex": (_of_kind(torch.complex64), "lora_A.weight has dtype torch.complex64"),
    "bool": (_of_kind(torch.bool), "lora_A.weight has dtype torch.bool"),
    "whole numbers": (_of_kind(torch.int64), "lora_A.weight has dtype torch.int64"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_and_the_base_is_untouched(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    save_adapters(pair(), tmp_path)
    try:
        damage(tmp_path)
    except KeyError as error:
        if error.args != (torch.complex64,):
            raise
        pytest.skip("the oldest safetensors writes no complex numbers")
    base = build("vit-classifier").requires_grad_(True)
    snapshot = Snapshot(base, make_inputs("vit-classifier"))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_adapters(base, tmp_path)
    snapshot.check()


def test_another_base_is_refused_or_asked_for(tmp_path: Path) -> None:
    save_adapters(pair(), tmp_path)
    other = build("vit-classifier")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += torch.randn_like(parameter)
    snapshot = Snapshot(other, make_inputs("vit-classifier"))
    with pytest.raises(ValueError, match="made for the vision tower"):
        load_adapters(other, tmp_path)
    snapshot.check()
    loaded = load_adapters(other, tmp_path, ignore_base_mismatch=True)
    assert set(loaded.active_adapters) == {"registers", "other"}


def test_a_full_disk_leaves_the_earlier_save_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = pair(), make_inputs("vit-classifier")
    save_adapters(model, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    expected = run(model, inputs)

    def full(tensors: Any, path: Path, **options: Any) -> None:
        if path.parent.name == "other":
            raise OSError(28, "No space left on device")
        written(tensors, path, **options)

    written = adapter_folder.save_file
    monkeypatch.setattr(adapter_folder, "save_file", full)
    with pytest.raises(OSError, match=r"No space left.*untouched"):
        save_adapters(pair(), tmp_path / "out")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_identical(run(load_adapters(build("vit-classifier"), tmp_path / "out"), inputs), expected)
    save_adapters(pair(), tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_model_without_adapters_and_a_file_are_refused(tmp_path: Path) -> None:
    base = build("vit")
    snapshot = Snapshot(base, make_inputs("vit"))
    with pytest.raises(ValueError, match="carries no adapter"):
        save_adapters(base, tmp_path / "out")
    snapshot.check()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_adapters(pair(), tmp_path / "file")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("order", [("other", "registers"), ("registers", "other"), ("registers", "place", "other")])
@pytest.mark.parametrize("heads", [None, ["classifier"]])
def test_biases_that_lora_brings_along_are_trained_in_every_order(
    bias: Any, order: tuple[str, ...], heads: Any, tmp_path: Path
) -> None:
    """Behind registers LoRA's biases stayed frozen, in silence."""
    name = "vit-classifier"
    config = LoraConfig(target_modules=["q_proj", "query"], bias=bias, init_lora_weights=False)
    configs: dict[str, Any] = {
        "other": config,
        "registers": registers(modules_to_save=heads),
        "place": PositionConfig(),
    }
    alone = get_peft_model(build(name), config, "other")
    expected = {key for key, value in alone.named_parameters() if value.requires_grad and key.endswith("bias")}
    model = compose(build(name), {key: configs[key] for key in order})

    def biases(model: nn.Module) -> dict[str, nn.Parameter]:
        named = {key: value for key, value in model.named_parameters() if key.endswith("bias") and value.requires_grad}
        return {key: value for key, value in named.items() if not heads or "classifier" not in key}

    assert expected
    wanted = {key for key in expected if not heads or "classifier" not in key}
    assert set(biases(model)) == wanted
    with torch.no_grad():
        for value in biases(model).values():
            value += 0.5
    model.save_pretrained(tmp_path)
    again = load_adapters(build(name), tmp_path, is_trainable=True)
    assert set(biases(again)) == wanted
    if any(key.endswith("bias") for key in get_peft_model_state_dict(alone, adapter_name="other")):  # PEFT 0.18 saves
        # none of "lora_only", of LoRA alone neither
        assert_identical(run(again.eval(), make_inputs(name)), run(model.eval(), make_inputs(name)))


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("way", ["disable_adapter", "delete_adapter", "unload"])
def test_biases_that_lora_trained_stay_and_a_warning_says_so(way: str, bias: Any) -> None:
    base, inputs = build("vit"), make_inputs("vit")
    before = run(base, inputs)["last_hidden_state"]
    lora = LoraConfig(target_modules=["q_proj", "query"], bias=bias)
    model = compose(base, {"registers": RegisterConfig(init_std=1.0), "lora": lora})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "disable_adapter":
            with model.disable_adapter():
                after = run(model, inputs)["last_hidden_state"]
        elif way == "delete_adapter":
            model.delete_adapter("lora")
            with model.disable_adapter():
                after = run(model, inputs)["last_hidden_state"]
        else:
            after = run(model.unload(), inputs)["last_hidden_state"]
    said = [str(item.message) for item in caught if f"'{bias}'" in str(item.message)]
    assert len(said) == (bias != "none")
    assert torch.equal(after, before) == (bias == "none")
