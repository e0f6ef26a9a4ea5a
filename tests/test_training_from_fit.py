"""Training that goes on from fitted registers: their neurons kept, dropped or annealed away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import assert_identical, run
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file
from training_helpers import adapter_bytes, write_vit

from register_adapter import RegisterConfig, add_registers, capture, compose, find_register_layer
from register_adapter.neurons import set_strength, start_from
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit
from register_adapter.training import AnnealNeurons
from register_adapter.training.launch import main

pytestmark = pytest.mark.slow

NEURONS = {0: [1, 4, 6]}


def fitted(name: str = "vit", **options: Any) -> Any:
    """A model with register neurons, as a fit leaves it; the values are made up."""
    model = add_registers(build(name), 2, init="test_time", register_neurons=NEURONS, **options).eval()
    tokens = find_register_layer(model).tokens("default")
    tokens.set_usual(torch.linspace(-0.1, 0.1, 3), torch.full((3,), 0.05))
    with torch.no_grad():
        tokens.weight.copy_(torch.randn(tokens.weight.shape, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.mark.parametrize("remove", ["zero", "mean", "outliers"])
@pytest.mark.parametrize("neurons", ["keep", "anneal"])
def test_a_new_adapter_starts_where_the_fitted_one_is(neurons: str, remove: str) -> None:
    model, inputs = fitted(remove=remove), make_inputs("vit")
    expected = run(model, inputs)
    start = start_from(model, neurons)
    new = add_registers(model.unload(), **start.options).eval()
    tokens = find_register_layer(new).tokens("default")
    start.fill(tokens)
    assert_identical(run(new, inputs), expected)
    trained = {name.rpartition(".")[2] for name, value in new.named_parameters() if value.requires_grad}
    assert trained == ({"weight", "strength"} if neurons == "keep" else {"weight"})


def test_dropped_neurons_leave_what_the_registers_held() -> None:
    model, inputs = fitted(), make_inputs("vit")
    with torch.no_grad(), capture(model, attentions=False) as trace:
        model(**inputs)
    held = trace.hidden_states[1][:, 1:3].mean(0)
    start = start_from(model, "drop", [inputs])
    new = add_registers(model.unload(), **start.options).eval()
    layer = find_register_layer(new)
    start.fill(layer.tokens("default"))
    assert new.peft_config["default"].register_neurons is None
    assert new.peft_config["default"].insert_layer == 1
    torch.testing.assert_close(layer.tokens("default").weight.detach(), held)


@pytest.mark.parametrize("init", ["normal", "cls"])
def test_a_plain_adapter_goes_on_too(init: str) -> None:
    inputs = make_inputs("vit")
    model = add_registers(build("vit"), 3, init=init, init_std=1.0, insert_layer=1).eval()
    expected, start = run(model, inputs), start_from(model)
    new = add_registers(model.unload(), **start.options).eval()
    start.fill(find_register_layer(new).tokens("default"))
    assert (new.peft_config["default"].init, new.peft_config["default"].init_std) == (init, 1.0)
    assert_identical(run(new, inputs), expected)


@pytest.mark.parametrize(
    ("options", "neurons", "message"),
    [
        ({"key_value": True}, "drop", "attention-bias"),
        ({}, "drop", "images"),
        (None, "anneal", "no register neurons"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict[str, Any] | None, neurons: str, message: str) -> None:
    if options is None:
        model = add_registers(build("vit"), 2)
    else:
        model = add_registers(build("vit"), 2, init="test_time", register_neurons=NEURONS, **options)
    with pytest.raises(ValueError, match=message):
        start_from(model, neurons)


def test_the_shift_fades_in_a_straight_line_that_ends_early() -> None:
    model = fitted()
    callback = AnnealNeurons(until=0.5)
    strengths = []
    for progress in (0.0, 0.25, 0.5, 0.75):
        callback.on_step_begin(model, progress)
        strengths.append(find_register_layer(model).tokens("default").strength.unique().item())
    assert strengths == [1.0, 0.5, 0.0, 0.0]
    set_strength(model, 1.0)
    assert callback.details()["annealed_until"] == 0.5


def test_a_strength_is_that_of_the_active_adapter() -> None:
    model = fitted()
    model.add_adapter("other", RegisterConfig(num_registers=1, init="test_time", register_neurons=NEURONS))
    set_strength(model, 0.25)
    tokens = find_register_layer(model).tokens
    assert (tokens("default").strength.unique().item(), tokens("other").strength.unique().item()) == (0.25, 1.0)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="strength must be from 0 to 1"):
            set_strength(model, wrong)
    with pytest.raises(ValueError, match="registers"):
        set_strength(build("vit"), 0.5)


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize(
    ("strength", "said"),
    [
        (1.0, None),
        (0.5, "Strength of what they move | 0.5 to 0.5 (1 as fitted)"),
        (0.0, "Strength of what they move | 0: they move nothing any more (1 as fitted)"),
    ],
)
def test_a_card_tells_how_far_the_neurons_are_shifted(
    strength: float, said: str | None, composed: bool, tmp_path: Path
) -> None:
    config = RegisterConfig(num_registers=2, init="test_time", register_neurons=NEURONS)
    lora = LoraConfig(target_modules=["q_proj", "query"])
    model = compose(build("vit"), {"registers": config, "lora": lora}) if composed else fitted()
    set_strength(model, strength)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert ("learned tokens" in text) == (strength == 0)
    assert said in text if said else "Strength of" not in text


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted ViT on disk, with images, and registers that were fitted to it."""
    folder = tmp_path_factory.mktemp("planted")
    load_planted_vit().model.save_pretrained(folder / "model")
    load_image_processor().save_pretrained(folder / "model")
    SceneDataset(64, seed=3, split=None).write(folder / "images")
    return folder


def flags(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / "model"), "--train_dir", str(folder / "images")),
        *("--output_dir", str(out), "--per_device_train_batch_size", "8", "--max_train_steps", "6"),
        *("--learning_rate", "0.01", "--use_cpu", "--max_eval_samples", "8", *more),
    ]


def test_a_fit_that_finds_nothing_advises_flags_that_the_run_has(
    planted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = flags(planted, tmp_path / "out", "--init", "test_time", "--model-name-or-path", "clean")
    with pytest.raises(SystemExit):
        main(words)
    said = capfd.readouterr().err
    assert "needs no registers" in said
    assert "another --init; or say which patches are outliers to `register-adapter fit` (--threshold" in said
    assert "threshold=" not in said


def trained(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key.rpartition(".")[2]: value for key, value in tensors.items() if "register_adapter_tokens" in key}


def test_init_test_time_fits_on_the_training_images_first(planted: Path, tmp_path: Path) -> None:
    main(flags(planted, tmp_path / "a", "--init", "test_time", "--num_registers", "2"))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    layer, neurons = str(load_planted_vit().block), sorted(load_planted_vit().neurons)
    assert config["register_neurons"] == {layer: len(neurons)}
    assert config["test_time_fit"]["share_after"] == 0
    values = trained(tmp_path / "a")
    assert sorted(values["units"].tolist()) == neurons
    assert values["weight"].shape[0] == 2
    assert (values["weight"] != 0).any(1).all()
    assert (values["strength"] != 1).any(), "the strengths are trained"

    main(flags(planted, tmp_path / "b", "--adapter_name_or_path", str(tmp_path / "a"), "--neurons", "drop"))
    assert set(trained(tmp_path / "b")) == {"weight"}
    base = load_planted_vit().model
    PeftModel.from_pretrained(base, tmp_path / "b")
    assert find_register_layer(base).tokens("default").count == 2


def test_an_annealed_run_can_be_resumed(planted: Path, tmp_path: Path) -> None:
    options = ("--init", "test_time", "--neurons", "anneal", "--checkpointing_steps", "3")
    main(flags(planted, tmp_path / "whole", *options))
    assert not trained(tmp_path / "whole")["strength"].any()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "parts" / "checkpoint-3")
    main(flags(planted, tmp_path / "parts", *options, "--resume_from_checkpoint", "latest"))
    assert adapter_bytes(tmp_path / "parts") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize("resumed", [False, True])
def test_the_best_of_an_annealed_run_has_the_strength_that_it_was_measured_with(
    resumed: bool, planted: Path, tmp_path: Path
) -> None:
    """The strength is no parameter, and went on to fall after the best evaluation."""
    words = ("--init", "test_time", "--neurons", "anneal", "--load_best_model_at_end", "--eval_steps", "1")
    # Later steps ruin the registers, so that an early one is the best.
    options = (*words, "--learning_rate", "10", "--checkpointing_steps", "5", "--train_val_split", "0.5")
    main(flags(planted, tmp_path / "a", *options))
    if resumed:
        shutil.copytree(tmp_path / "a" / "checkpoint-5", tmp_path / "b" / "checkpoint-5")
        main(flags(planted, tmp_path / "b", *options, "--resume_from_checkpoint", "latest"))
    out = tmp_path / ("b" if resumed else "a")
    results = json.loads((out / "results.json").read_text())
    step, total = results["best"]["step"], results["global_step"]
    assert step < 5 < total
    expected = 1 - (step - 1) / total / 0.8
    assert trained(out)["strength"].tolist() == pytest.approx([expected] * len(trained(out)["strength"]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--neurons", "drop"), "needs --adapter-name-or-path"),
        (("--adapter_name_or_path", "x", "--init", "zeros"), "leave out --init"),
        (("--adapter_name_or_path", "x", "--num-registers", "2", "--gate", "0"), "leave out --gate, --num-registers"),
        (("--init", "test_time", "--init-std", "0.5"), "leave out --init-std"),
    ],
)
def test_flags_that_contradict_each_other(more: tuple[str, ...], message: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(flags(tmp_path, tmp_path / "out", *more))
    assert message in capsys.readouterr().err


# What was trained beside the registers


def train_further(folder: Path, images: Path, out: Path, source: Path, *more: str) -> Path:
    """One step that changes next to nothing, onward from an adapter."""
    words = (*("--train_dir", str(images), "--adapter_name_or_path", str(source)), *("--learning_rate", "1e-12", *more))
    main(flags(folder, out, *words, "--max_train_steps", "1"))
    return out


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two classes, the same two under other names, three classes, and runs with a head for the first two."""
    folder = tmp_path_factory.mktemp("heads")
    write_vit(folder / "model", ["a", "b"])
    for name, classes in (("two", "ab"), ("renamed", "xy"), ("three", "abc")):
        for number, label in enumerate(classes):
            (folder / name / label).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (32, 32), (80 * number, 20 * index, 9)).save(folder / name / label / f"{index}.png")
    for out, train in (("alone", "registers"), ("several", "registers+lora")):
        main(flags(folder, folder / out, "--train_dir", str(folder / "two"), "--train", train))
    return folder


def head_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (f for f in folder.rglob("adapter_model.safetensors") if any("classifier" in k for k in load_file(f)))
    return {key.rpartition(".")[2]: value for key, value in load_file(file).items() if "classifier" in key}


@pytest.mark.parametrize(
    ("source", "train"), [("alone", ()), ("several", ()), ("alone", ("--train", "registers+lora"))]
)
def test_a_trained_head_goes_on(with_heads: Path, tmp_path: Path, source: str, train: tuple[str, ...]) -> None:
    out = train_further(with_heads, with_heads / "two", tmp_path, with_heads / source, *train)
    assert_identical(head_of(out), head_of(with_heads / source))
    assert f"| Trained further from | {source} |" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        ("renamed", (), "its classes are 'a', 'b', here they are 'x', 'y'; a new one is trained"),
        ("three", (), "its classes are 'a', 'b', here they are 'a', 'b', 'c'; a new one is trained"),
        ("two", ("--freeze-head",), "this run does not train it, and keeps the base's own"),
    ],
)
def test_a_head_that_does_not_go_on_is_named(
    with_heads: Path, tmp_path: Path, capsys: Any, images: str, more: tuple[str, ...], message: str
) -> None:
    train_further(with_heads, with_heads / images, tmp_path, with_heads / "alone", *more)
    assert f"'classifier' trained beside its registers, which is left out: {message}" in capsys.readouterr().err


def test_several_adapters_without_a_head_go_on_with_a_frozen_one(with_heads: Path, tmp_path: Path, capsys: Any) -> None:
    images = with_heads / "two"
    folder = tmp_path / "first"
    main(flags(with_heads, folder, "--train_dir", str(images), "--train", "registers+lora", "--freeze-head"))
    with pytest.raises(SystemExit):
        train_further(with_heads, images, tmp_path / "second", folder)
    assert "was trained without ['classifier']" in (said := capsys.readouterr().err)
    assert "add --freeze-head" in said
    train_further(with_heads, images, tmp_path / "second", folder, "--freeze-head")


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        ("renamed", (), "has a head for the classes 'a', 'b', here they are 'x', 'y'"),
        ("three", (), "has a head for the classes 'a', 'b', here they are 'a', 'b', 'c'"),
        ("two", ("--freeze-head",), "leave out --freeze-head"),
    ],
)
def test_a_head_among_several_adapters_that_cannot_go_on_is_refused(
    with_heads: Path, tmp_path: Path, capsys: Any, images: str, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit):
        train_further(with_heads, with_heads / images, tmp_path, with_heads / "several", *more)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))
