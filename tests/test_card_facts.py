"""What a card says about how its adapter came about: fitted or trained, on what, and what the head does alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import build, make_inputs
from transformers import ViTForImageClassification

from register_adapter import RegisterConfig, add_registers, find_register_layer
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit, load_vit
from register_adapter.training import TrainArguments, train, wrap
from register_adapter.training.objectives import ClassificationObjective
from register_adapter.tuner.card import update_model_card
from register_adapter.tuner.card_text import INSTALL

ROOT = Path(__file__).parents[1]
TOWER = {"family": "vit", "hidden_size": 32, "num_hidden_layers": 4, "patch_size": 8}


def test_the_package_is_installed_from_its_repository(tmp_path: Path) -> None:
    (url,) = re.findall(r'^Repository = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"pip install git+{url}" == INSTALL
    add_registers(build("vit")).save_pretrained(tmp_path)
    assert f"```bash\n{INSTALL}\n```" in (tmp_path / "README.md").read_text()


def test_a_fitted_adapters_card_says_what_was_found(tmp_path: Path) -> None:
    fit = {"rule": "auto", "share_before": 0.125, "share_after": 0.00031}
    fit["num_images"] = {"detect": 50, "rank": 30, "held_out": 20}  # the latter two are among the 50
    config = RegisterConfig(init="test_time", register_neurons={2: [1, 5], 3: [4]}, test_time_fit=fit)
    config.base_tower = TOWER
    update_model_card(tmp_path / "README.md", config, ViTForImageClassification)
    text = (tmp_path / "README.md").read_text()
    assert "3 hidden units of MLPs (block 2: 2, block 3: 1)" in text
    assert "| Images they were found on | 50 (detect 50, rank 30, held_out 20) |" in text
    assert "| Rule for outliers | `auto` |" in text
    assert "| Patches beyond the base's threshold, held-out images | 12.500% before, 0.031% after |" in text
    assert "2506.08010" in text
    assert "standard deviation" not in text
    assert "learned tokens" not in text


LEARNED, REMOVED = "learned tokens that enter its sequence", "and are removed from every output"


@pytest.mark.parametrize(
    ("options", "sentence", "registers", "initial"),
    [
        ({}, f"{LEARNED} behind the embedding layer {REMOVED}.", "4 × 32", "`normal`, standard deviation 0.02"),
        ({"insert_layer": 2}, f"{LEARNED} before block 2 {REMOVED}.", "4 × 32", "`normal`, standard deviation 0.02"),
        (
            {"deep": True, "insert_layer": 1, "init": "zeros"},
            "fresh ones at every block from block 1 on",
            "4 × 32 in each of 3 blocks",
            "`zeros`",
        ),
        (
            {"key_value": True, "gate": -5.0},
            "in the attention of every block; no token enters the sequence",
            "4 × 32 keys and as many values in each of 4 blocks",
            "`normal`, standard deviation 0.02",
        ),
        (
            {"init": "outliers", "test_time_fit": {"rule": "auto"}},
            f"{LEARNED} behind",
            "4 × 32",
            "`outliers`, what the base's outlier patches are where registers enter",
        ),
        (
            {"insert_layer": 3, "test_time_fit": {"rule": "auto"}},
            f"{LEARNED} before block 3",
            "4 × 32",
            "the mean of what register neurons had put into them, which were removed",
        ),
    ],
)
def test_the_card_says_where_registers_are_and_what_they_started_at(
    tmp_path: Path, options: dict[str, Any], sentence: str, registers: str, initial: str
) -> None:
    config = RegisterConfig(**options)
    config.base_tower = TOWER
    update_model_card(tmp_path / "README.md", config, ViTForImageClassification)
    text = (tmp_path / "README.md").read_text()
    assert sentence in text
    assert f"| Registers | {registers} |" in text
    assert f"| Initial values | {initial} |" in text
    assert ("| Gate | a bias on the attention to registers, made as -5 |" in text) is ("gate" in options)
    if options.get("key_value"):
        assert LEARNED not in text
        assert REMOVED not in text


@pytest.mark.parametrize(
    ("tower", "sentence"),
    [
        (TOWER | {"fingerprint": [0.5, 0.25]}, "or whose vision tower's weights have another fingerprint, is refused."),
        (TOWER | {"fingerprint": None}, "weights are not compared, since none were recorded."),
        (None, "The base model was not recorded"),
    ],
    ids=["weights", "shape", "nothing"],
)
def test_the_card_says_which_bases_are_refused(tmp_path: Path, tower: dict[str, Any] | None, sentence: str) -> None:
    config = RegisterConfig(modules_to_save=["classifier"] if tower else None)
    config.base_tower = tower
    update_model_card(tmp_path / "README.md", config, ViTForImageClassification)
    text = (tmp_path / "README.md").read_text()
    assert sentence in text
    assert ("takes the place of its own" in text) is (tower is not None)


def test_the_card_of_the_attention_bias_form_names_no_token(tmp_path: Path) -> None:
    config = RegisterConfig(init="test_time", register_neurons={2: [1, 5]}, key_value=True, test_time_fit={})
    config.base_tower = TOWER
    update_model_card(tmp_path / "README.md", config, ViTForImageClassification)
    text = (tmp_path / "README.md").read_text()
    assert "no token enters the sequence" in text
    assert "tokens that are removed" not in text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], torch.nn.Module]:
    out = tmp_path_factory.mktemp("trained") / "out"
    objective = ClassificationObjective()
    model = wrap(load_vit(), objective, num_registers=4, init_std=1.0)
    args = TrainArguments(output_dir=str(out), max_train_steps=2, checkpointing_steps=2, use_cpu=True, seed=7)
    results = train(
        model,
        objective,
        SceneDataset(16, seed=1),
        args,
        SceneDataset(8, seed=2),
        image_processor=load_image_processor(),
        training_data="some/images",
        evaluation_data="other/images",
    )
    return out, results["metrics"], model


@pytest.mark.slow
def test_the_evaluation_measures_the_head_alone_too(trained: tuple[Path, dict[str, float], torch.nn.Module]) -> None:
    out, metrics, model = trained
    assert metrics["eval_registers_off_loss"] != metrics["eval_loss"]
    layer = find_register_layer(model)
    assert layer is not None
    assert layer.segments  # they are back
    text = (out / "README.md").read_text()
    assert "| measured | with the registers | registers off, all else the same |" in text
    assert f"| eval_loss | {metrics['eval_loss']:.6g} | {metrics['eval_registers_off_loss']:.6g} |" in text
    for row in ("| Training images | 16 |", "| Evaluation images | 8 |", "| Steps | 2 |", "| Seed | 7 |"):
        assert row in text
    assert "Classes of the head" in text
    assert "Measured on other/images." in text
    metadata = yaml.safe_load(text.split("---")[1])
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["name"] == "other/images"
    assert metadata["datasets"] == ["some/images"]
    assert not [metric for metric in result["metrics"] if "off" in metric["name"]]


@pytest.mark.slow
def test_a_checkpoints_card_names_the_checkpoint_and_the_run(
    trained: tuple[Path, dict[str, float], torch.nn.Module],
) -> None:
    text = (trained[0] / "checkpoint-2" / "README.md").read_text()
    assert 'from_pretrained(base, "checkpoint-2")' in text
    assert "Not stated" not in text
    whole = (trained[0] / "README.md").read_text()
    for row in ("| Training images | 16 |", "| Seed | 7 |", "| Objective | classification |"):
        assert row in text
        assert row in whole
    assert "| Steps | 2 |" in text
    assert "None recorded." in text  # measured at the end, of what is saved there


def test_setting_registers_aside_keeps_the_head() -> None:
    model = add_registers(build("vit-classifier"), modules_to_save=["classifier"], init_std=1.0).eval()
    inputs, base = make_inputs("vit-classifier"), build("vit-classifier")
    head = model.get_base_model().classifier.modules_to_save["default"]
    layer = find_register_layer(model)
    assert layer is not None
    with torch.no_grad():
        head.weight += 1
        base.classifier.weight += 1
        with layer.set_aside():
            assert torch.equal(model(**inputs).logits, base.eval()(**inputs).logits)
        assert not torch.equal(model(**inputs).logits, base(**inputs).logits)


def test_the_snippet_of_a_shipped_models_adapter_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_registers(load_planted_vit().model).save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert 'load_shipped("register-adapter://planted")' in snippet
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(snippet, scope)
    assert scope["model"]
