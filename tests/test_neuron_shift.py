"""The shift of register neurons: what a naive loop over images and neurons does, in every stack and beside others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crossings import crossings
from families import CASES, TOWERS, build, make_inputs
from helpers import Snapshot, assert_identical, differs, run, shapes
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stacks_cases import STACKS, build_stack, call, images

from register_adapter import (
    AdapterFileError,
    RegisterConfig,
    UnsupportedModelError,
    add_registers,
    export_native,
    find_register_layer,
    find_tower,
)

NEURONS = {0: [1, 4, 6], 1: [2, 9]}


def tokens_of(model: Any, name: str = "default") -> Any:
    return find_register_layer(model).tokens(name)


def watch(model: Any, act: Any) -> list[Any]:
    """Call ``act(block, activations)`` on what goes into the last layer of every MLP."""
    tower = find_register_layer(model).tower
    return [
        tower.block_part(block, "mlp_out").register_forward_pre_hook(
            lambda module, args, block=block: act(block, args[0]), prepend=True
        )
        for block in range(len(tower.part("blocks")))
    ]


def naive(activations: torch.Tensor, units: list[int], first: int, count: int, remove: str, tokens: Any, part: slice):
    """The published procedure, one image and one neuron at a time."""
    result = activations.clone()
    for image in range(len(activations)):
        for place, unit in zip(range(part.start, part.stop), units, strict=True):
            values = activations[image, :, unit]
            usual, limit = tokens.usual[place], tokens.limits[place]
            kept = {
                "zero": torch.zeros_like(values),
                "mean": torch.full_like(values, usual.item()),
                "outliers": torch.where(values.abs() > limit, usual, values),
            }[remove]
            kept[first : first + count] = values[values.abs().argmax()]
            result[image, :, unit] = kept
    return result


@pytest.mark.parametrize(
    ("name", "count", "remove"),
    crossings(TOWERS, (1, 4), ("zero", "mean", "outliers"), whole=("vit", "dinov3"), each=2),
)
def test_it_is_what_a_loop_over_images_and_neurons_does(name: str, count: int, remove: str) -> None:
    inputs = make_inputs(name)
    options = {"register_neurons": NEURONS, "remove": remove, "init": "test_time"}
    model = add_registers(build(name), count, **options).eval()
    tokens = tokens_of(model)
    tokens.set_usual(torch.linspace(-0.1, 0.1, 5), torch.full((5,), 0.05))
    given: dict[int, torch.Tensor] = {}
    watch(model, lambda block, x: given.__setitem__(block, x.clone()))
    after: dict[int, torch.Tensor] = {}
    tower = find_register_layer(model).tower
    for block in NEURONS:
        tower.block_part(block, "mlp_out").register_forward_pre_hook(
            lambda module, args, block=block: after.__setitem__(block, args[0].clone())
        )
    run(model, inputs)
    for block, units in NEURONS.items():
        expected = naive(given[block], units, tower.prefix, count, remove, tokens, tokens.slices[block])
        torch.testing.assert_close(after[block], expected, rtol=0, atol=1e-6)
        assert differs({"x": after[block]}, {"x": given[block]})


@pytest.mark.parametrize("name", STACKS)
def test_other_libraries(name: str) -> None:
    base, x = build_stack(name), images()
    calls = STACKS[name].calls
    if find_tower(base).block_part(0, "mlp_out") is None:
        with pytest.raises(UnsupportedModelError, match="MLP"):
            add_registers(base, 1, init="test_time", register_neurons=NEURONS)
        return
    expected = {kind: shapes(call(kind, base, x)) for kind in calls}
    model = add_registers(base, 1, init="test_time", register_neurons=NEURONS).eval()
    tokens, layer = tokens_of(model), find_register_layer(model)
    given: dict[int, torch.Tensor] = {}
    after: dict[int, torch.Tensor] = {}
    watch(model, lambda block, x: given.__setitem__(block, x.clone()))
    for block in NEURONS:
        layer.tower.block_part(block, "mlp_out").register_forward_pre_hook(
            lambda module, args, block=block: after.__setitem__(block, args[0].clone())
        )
    for kind in calls:
        given.clear()
        assert shapes(call(kind, base, x)) == expected[kind]
        for block in given.keys() & NEURONS.keys():  # some calls stop early
            wanted = naive(given[block], NEURONS[block], layer.prefix, 1, "zero", tokens, tokens.slices[block])
            torch.testing.assert_close(after[block], wanted, rtol=0, atol=1e-6)
        assert given


@pytest.mark.parametrize("name", TOWERS)
def test_a_batch_is_what_its_images_are_alone(name: str) -> None:
    inputs = make_inputs(name, batch=4)
    model = add_registers(build(name), 1, init="test_time", register_neurons=NEURONS).eval()
    together = run(model, inputs)[CASES[name].output]
    for index in range(4):
        alone = run(model, {key: value[index : index + 1] for key, value in inputs.items()})[CASES[name].output]
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov2-swiglu", "clip-vision"])
def test_every_image_with_another_adapter(name: str) -> None:
    inputs = make_inputs(name, batch=3)
    model = add_registers(build(name), 1, "a", init="test_time", register_neurons=NEURONS)
    model.add_adapter("b", RegisterConfig(num_registers=1, init="test_time", register_neurons={1: [3]}, remove="mean"))
    model.eval()
    expected = []
    for index, adapter in enumerate(["b", "a", None]):
        row = {key: value[index : index + 1] for key, value in inputs.items()}
        if adapter is None:
            with model.disable_adapter():
                expected.append(run(model, row)["last_hidden_state"])
        else:
            model.set_adapter(adapter)
            expected.append(run(model, row)["last_hidden_state"])
    with torch.no_grad():
        hidden = model(**inputs, adapter_names=["b", "a", "__base__"]).last_hidden_state
    torch.testing.assert_close(hidden, torch.cat(expected), rtol=0, atol=1e-5)


def test_strength_goes_from_the_activation_as_it_is_to_the_shifted_one() -> None:
    inputs = make_inputs("vit")
    model = add_registers(build("vit"), 2, init="test_time", register_neurons=NEURONS, train_removal=True).eval()
    with torch.no_grad():
        for strength, reference in ((0.0, 0.0), (-3.0, 0.0), (1.0, 1.0), (7.0, 1.0)):
            tokens_of(model).strength.fill_(strength)
            outputs = run(model, inputs)
            tokens_of(model).strength.fill_(reference)
            assert_identical(outputs, run(model, inputs))
    registers = RegisterConfig(num_registers=2, init_std=0.0)
    model.add_adapter("plain", registers)
    with torch.no_grad():
        tokens_of(model).strength.fill_(0.0)
    untouched = run(model, inputs)
    model.set_adapter("plain")
    assert_identical(untouched, run(model, inputs))


def test_a_strength_at_its_end_still_gets_a_gradient() -> None:
    model = add_registers(build("vit"), 1, init="test_time", register_neurons=NEURONS, train_removal=True).train()
    for value in (1.0, 1.2, -0.1):
        with torch.no_grad():
            tokens_of(model).strength.fill_(value)
        model.zero_grad()
        model(**make_inputs("vit")).last_hidden_state[:, 3, 0].sum().backward()
        assert (tokens_of(model).strength.grad != 0).all()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(name.rpartition(".")[2] for name in trained) == ["strength", "weight"]


def test_neurons_are_not_trained_unless_asked_for() -> None:
    model = add_registers(build("vit"), 1, init="test_time", register_neurons=NEURONS)
    trained = [name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["weight"]


def test_the_file_holds_the_neurons_and_the_config_their_numbers(tmp_path: Path) -> None:
    inputs = make_inputs("vit")
    model = add_registers(build("vit"), 1, init="test_time", register_neurons=NEURONS, remove="outliers").eval()
    tokens_of(model).set_usual(torch.linspace(-0.1, 0.1, 5), torch.full((5,), 0.05))
    expected = run(model, inputs)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["register_neurons"] == {"0": 3, "1": 2}
    assert config["format_version"] == 2
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert next(value for key, value in tensors.items() if key.endswith("units")).tolist() == [1, 4, 6, 2, 9]
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 14_000
    loaded = PeftModel.from_pretrained(build("vit"), tmp_path).eval()
    assert tokens_of(loaded).neurons() == NEURONS
    assert_identical(run(loaded, inputs), expected)
    with loaded.disable_adapter():
        assert_identical(run(loaded, inputs), run(build("vit"), inputs))


def test_plain_adapters_keep_their_format() -> None:
    assert RegisterConfig().to_dict()["format_version"] == 1


SPOILED = {
    "negative": (lambda t: t.update(units=t["units"] - 99), "negative"),
    "beyond": (lambda t: t.update(units=t["units"] + 10_000), "hidden unit"),
    "twice": (lambda t: t.update(units=t["units"] * 0), "more than once"),
    "float": (lambda t: t.update(units=t["units"].float()), "dtype"),
    "short": (lambda t: t.update(units=t["units"][:-1]), "shape"),
    "missing": (lambda t: t.pop("strength"), "strength"),
    "nan": (lambda t: t["limits"].fill_(torch.nan), "finite"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_file_is_refused_and_changes_nothing(how: str, tmp_path: Path) -> None:
    add_registers(build("vit"), 1, init="test_time", register_neurons=NEURONS).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    path = next(iter(tensors)).rpartition(".")[0]
    short = {key.rpartition(".")[2]: value for key, value in tensors.items()}
    spoil, message = SPOILED[how]
    spoil(short)
    save_file({f"{path}.{key}": value for key, value in short.items()}, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "weights_sha256": None}))
    snapshot = Snapshot(build("vit"), make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_pretrained(snapshot.model, tmp_path)
    snapshot.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"register_neurons": {0: 3}}, "list of hidden units"),
        ({"register_neurons": {0: [1, 1]}}, "each once"),
        ({"register_neurons": {"first": [1]}}, "index of a block"),
        ({"register_neurons": {0: [-1]}}, "hidden units"),
        ({"register_neurons": {0: [True]}}, "hidden units"),
        ({"register_neurons": {0: [1]}, "deep": True}, "deep"),
        ({"register_neurons": {0: [1]}, "insert_layer": 1}, "before the registers start"),
        ({"register_neurons": {0: [1]}, "remove": "all"}, "remove"),
        ({"init": "test_time"}, "fit_test_time_registers"),
        ({"train_removal": True}, "fit_test_time_registers"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegisterConfig(**options)


@pytest.mark.parametrize(("neurons", "error"), [({9: [0]}, UnsupportedModelError), ({0: [10_000]}, AdapterFileError)])
def test_neurons_that_the_model_lacks_are_refused_before_anything_is_changed(neurons: Any, error: type) -> None:
    snapshot = Snapshot(build("vit"), make_inputs("vit"))
    with pytest.raises(error):
        add_registers(snapshot.model, 1, init="test_time", register_neurons=neurons)
    snapshot.check()


def test_no_native_class_shifts_neurons() -> None:
    model = add_registers(build("dinov2"), 1, init="test_time", register_neurons=NEURONS)
    with pytest.raises(ValueError, match="register_neurons"):
        export_native(model)


def test_a_copy_has_neurons_of_its_own() -> None:
    inputs = make_inputs("vit")
    model = add_registers(build("vit"), 1, init="test_time", register_neurons=NEURONS).eval()
    expected = run(model, inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        tokens_of(other).strength.fill_(0.0)
    assert differs(run(other, inputs), expected)
    assert_identical(run(model, inputs), expected)


@pytest.mark.slow
def test_every_family_has_its_mlp_where_the_table_says() -> None:
    without = [name for name in CASES if find_tower(build(name)).block_part(0, "mlp_out") is None]
    assert without == []


def test_a_towers_neurons_load_into_a_model_with_a_head(tmp_path: Path) -> None:
    whole = build("vit-classifier")
    model = add_registers(copy.deepcopy(whole.vit), 1, init="test_time", register_neurons=NEURONS).eval()
    model.save_pretrained(tmp_path)
    expected = run(model, make_inputs("vit"))["last_hidden_state"]
    loaded = PeftModel.from_pretrained(whole, tmp_path).eval()
    assert tokens_of(loaded).neurons() == NEURONS
    assert torch.equal(run(loaded.get_base_model().vit, make_inputs("vit"))["last_hidden_state"], expected)
