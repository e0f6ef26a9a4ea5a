"""The model card: what it says, what it leaves alone, and that its snippet runs."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_client import small_base
from processes import run_script
from torch import nn
from transformers import (
    CLIPModel,
    CLIPVisionModel,
    Dinov2Backbone,
    Dinov2ForImageClassification,
    Dinov2Model,
    SiglipModel,
    ViTForImageClassification,
    ViTModel,
)

from register_adapter import RegisterConfig, add_registers
from register_adapter.tuner.card import is_hub_name, update_model_card

BEGIN, END = "<!-- register-adapter: begin", "<!-- register-adapter: end -->"


class Stranger(nn.Module):
    """A base model's class that transformers does not have."""


def config(base: str | None = "facebook/dinov2-base", **options: Any) -> RegisterConfig:
    tower = {"family": "dinov2", "hidden_size": 768, "num_hidden_layers": 12, "patch_size": 14}
    return RegisterConfig(base_model_name_or_path=base, base_tower=tower, **options)


def parts(path: Path) -> tuple[dict[str, Any], str]:
    """A README's metadata and text."""
    with path.open(newline="", encoding="utf-8") as file:
        match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text := file.read(), re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1]), text[match.end() :]


@pytest.fixture
def card(tmp_path: Path) -> Path:
    return tmp_path / "dinov2-registers" / "README.md"


@pytest.fixture
def new_card(card: Path) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a card with everything that is known of an adapter."""
    facts: dict[str, Any] = {
        "training_data": "me/scenes",
        "metrics": {"eval_accuracy": 0.91, "loss": float("nan")},
        "license": "apache-2.0",
    }
    update_model_card(card, config(num_registers=8, modules_to_save=["classifier"]), Dinov2Model, **facts)
    return parts(card)


def test_a_new_card_has_the_results(new_card: tuple[dict[str, Any], str]) -> None:
    assert new_card[0]["model-index"] == [
        {
            "name": "dinov2-registers",
            "results": [
                {
                    "task": {"type": "image-feature-extraction"},
                    "dataset": {"name": "me/scenes", "type": "me/scenes"},
                    "metrics": [{"type": "accuracy", "value": 0.91, "name": "eval_accuracy"}],
                }
            ],
        }
    ]


def test_a_new_card_has_the_metadata_of_the_hub(new_card: tuple[dict[str, Any], str]) -> None:
    metadata, _ = new_card
    del metadata["model-index"]
    tags = ["register-tokens", "vision-transformer", "peft", "register-adapter", "transformers", "dinov2"]
    assert metadata == {
        "base_model": "facebook/dinov2-base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "image-feature-extraction",
        "datasets": ["me/scenes"],
        "metrics": ["accuracy"],
        "tags": [*tags, "base_model:adapter:facebook/dinov2-base"],
    }


@pytest.mark.parametrize(
    "line",
    [
        "# Register tokens for facebook/dinov2-base",
        "import register_adapter  # makes the method known to PEFT",
        "from transformers import Dinov2Model",
        'base = Dinov2Model.from_pretrained("facebook/dinov2-base")',
        'model = PeftModel.from_pretrained(base, "dinov2-registers")'
        "  # a local folder: put its path here, or the name of this repository",
        "| Registers | 8 × 768 |",
        "| Its vision tower | dinov2 (12 blocks of width 768, patch 14) |",
        "| Saved as a whole beside them | `classifier` |",
        "| eval_accuracy | 0.91 |",
        "| loss | not finite |",
        "me/scenes",
    ],
)
def test_a_new_card_says_what_the_adapter_is(line: str, new_card: tuple[dict[str, Any], str]) -> None:
    assert line in new_card[1].splitlines()


def test_nothing_is_made_up(card: Path) -> None:
    update_model_card(card, config(), Dinov2Model)
    metadata, text = parts(card)
    assert not {"license", "datasets", "metrics", "model-index"} & set(metadata)
    assert "Not stated." in text
    assert "None recorded." in text


@pytest.mark.parametrize(
    ("base_class", "task"),
    [
        (ViTForImageClassification, "image-classification"),
        (Dinov2ForImageClassification, "image-classification"),
        (ViTModel, "image-feature-extraction"),
        (Dinov2Backbone, "image-feature-extraction"),
        (CLIPVisionModel, "image-feature-extraction"),
        (CLIPModel, "zero-shot-image-classification"),
        (SiglipModel, "zero-shot-image-classification"),
        (Stranger, None),
    ],
)
def test_the_task_is_the_base_classs(card: Path, base_class: type, task: str | None) -> None:
    update_model_card(card, config(), base_class)
    metadata, text = parts(card)
    assert metadata.get("pipeline_tag") == task
    assert ("transformers" in metadata["tags"]) == (task is not None)
    module = "transformers" if task else __name__
    assert f"from {module} import {base_class.__name__}\n" in text


def test_a_local_base_leaves_no_path(card: Path, tmp_path: Path) -> None:
    base = tmp_path / "home-of-alice" / "base"
    base.mkdir(parents=True)
    (tmp_path / "home-of-alice" / "photos").mkdir()
    update_model_card(card, config(str(base)), Dinov2Model, training_data=str(base.parent / "photos"), metrics={"a": 1})
    metadata, text = parts(card)
    assert not {"base_model", "base_model_relation", "datasets"} & set(metadata)
    assert "home-of-alice" not in card.read_text()
    assert "`base`, a local folder" in text
    assert 'from_pretrained("base")' in text
    assert "\nphotos\n" in text
    assert metadata["model-index"][0]["results"][0]["dataset"] == {"name": "photos", "type": "custom"}


def test_names_on_the_hub_are_told_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "vit").mkdir(parents=True)
    assert is_hub_name("google/vit-base-patch16-224")
    for name in (
        "runs/vit",
        "vit",
        "/google/vit",
        "./google/vit",
        "a/b/c",
        "",
        None,
        "1,000 images / seed 0",
        "x/" * 9,
    ):
        assert not is_hub_name(name), name


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_the_users_text_and_metadata_are_kept(card: Path, ending: str) -> None:
    before = (
        "---\nlicense: cc-by-4.0\ntags: [mine]\nlibrary_name: own\ncustom: {a: 1}\n---\n# Mine\n\n  Spaces  kept.\n"
    )
    card.parent.mkdir()
    card.write_bytes(before.replace("\n", ending).encode())
    for registers in (4, 16):
        update_model_card(card, config(num_registers=registers), Dinov2Model)
        with card.open("a", newline="", encoding="utf-8") as file:
            file.write(f"Added after {registers}.{ending}")
    metadata, text = parts(card)
    assert metadata["license"] == "cc-by-4.0"
    assert metadata["library_name"] == "own"
    assert metadata["custom"] == {"a": 1}
    assert metadata["tags"][0] == "mine"
    assert metadata["tags"].count("register-tokens") == 1
    assert text.startswith(f"# Mine{ending}{ending}  Spaces  kept.{ending}")
    assert text.endswith(f"{END}{ending}Added after 4.{ending}Added after 16.{ending}")
    assert "| Registers | 16 × 768 |" in text
    assert "| Registers | 4 × 768 |" not in text
    assert text.count(BEGIN) == text.count(END) == 1
    assert ("\n" in text.replace("\r\n", "")) == (ending == "\n")


def test_our_own_metadata_follows_the_adapter(card: Path) -> None:
    update_model_card(card, config(), ViTModel, tags=["old"])
    update_model_card(card, config("me/other"), ViTForImageClassification)
    metadata, _ = parts(card)
    assert metadata["base_model"] == "me/other"
    assert metadata["pipeline_tag"] == "image-classification"
    assert [tag for tag in metadata["tags"] if ":" in tag or tag == "old"] == ["base_model:adapter:me/other"]
    update_model_card(card, config(None), ViTForImageClassification)
    assert "base_model" not in parts(card)[0]


def test_what_somebody_corrected_stays(card: Path) -> None:
    update_model_card(card, config("me/mirror"), ViTModel)
    card.write_text(card.read_text().replace("\nbase_model: me/mirror\n", "\nbase_model: facebook/dinov2-base\n"))
    update_model_card(card, config("me/mirror"), ViTModel)
    assert parts(card)[0]["base_model"] == "facebook/dinov2-base"


def test_an_update_without_change_changes_nothing(card: Path) -> None:
    for _ in range(2):
        update_model_card(card, config(), ViTModel, training_data="me/x", metrics={"accuracy": 0.5}, license="mit")
    first = card.read_bytes()
    update_model_card(card, config(), ViTModel)
    assert card.read_bytes() == first


def test_results_stay_with_the_weights_they_were_measured_on(card: Path) -> None:
    card.parent.mkdir()
    weights = card.with_name("adapter_model.safetensors")
    weights.write_bytes(b"one")
    update_model_card(card, config(), ViTModel, training_data="me/x", metrics={"accuracy": 0.5}, license="mit")
    update_model_card(card, config(), ViTModel)
    assert "| accuracy | 0.5 |" in card.read_text()
    weights.write_bytes(b"two")
    update_model_card(card, config(), ViTModel)
    assert "0.5" not in card.read_text()
    assert "me/x" not in card.read_text()
    assert parts(card)[0]["license"] == "mit"


@pytest.mark.parametrize("broken", [END, BEGIN])
def test_text_survives_a_marker_that_was_deleted(card: Path, broken: str) -> None:
    update_model_card(card, config(), ViTModel)
    card.write_text(card.read_text().replace(broken, "") + "Mine.\n")
    for _ in range(2):
        update_model_card(card, config(), ViTModel)
        assert "\nMine.\n" in card.read_text()
    assert card.read_text().count("## Load it") == 2


def test_what_is_written_cannot_end_the_block(card: Path) -> None:
    nasty = f"images --> | {END} \n# of cats"
    for _ in range(2):
        update_model_card(card, config(), ViTModel, training_data=nasty, metrics={"a | b -->": 1.0})
    text = parts(card)[1]
    assert text.count(END) == 1
    assert text.count("## Results") == 1
    assert "\n# of cats" not in text


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"---\na: [1\n---\ntext",
        b"---\n- 1\n---\ntext",
        b"---\ntrue: 1\n---\ntext",
        b"---\ntags: 5\n---\ntext",
        b"---\ntags: [{a: 1}]\n---\ntext",
        b"---\na: !!omap [b: 1]\n---\ntext",
        b"---\na: " + b"{a: " * 5000 + b"}" * 5000 + b"\n---\ntext",
    ],
)
def test_a_readme_that_is_no_card_is_left_alone(card: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    card.parent.mkdir()
    card.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        update_model_card(card, config(), ViTModel)
    assert card.read_bytes() == content
    assert "README.md is not a model card" in caplog.text


def test_saving_writes_the_card_and_keeps_results_of_the_same_weights(tmp_path: Path) -> None:
    base = small_base()
    base.save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    model = add_registers(base)
    out = tmp_path / "out"
    model.save_pretrained(out)
    update_model_card(out / "README.md", model.peft_config["default"], type(base), metrics={"accuracy": 0.5})
    model.save_pretrained(out)
    assert "| accuracy | 0.5 |" in (out / "README.md").read_text()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    model.save_pretrained(out)
    assert "accuracy" not in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "README.md").read_text()


@pytest.mark.slow
def test_the_snippet_of_a_saved_adapter_runs_in_a_fresh_process(tmp_path: Path) -> None:
    small_base().save_pretrained(tmp_path / "base")
    model = add_registers(ViTForImageClassification.from_pretrained(tmp_path / "base"), num_registers=3)
    model.add_adapter("extra", RegisterConfig(num_registers=2, init_std=1.0))
    model.set_adapter("extra")
    model.save_pretrained(tmp_path / "my adapter")
    text = (tmp_path / "my adapter" / "README.md").read_text()
    assert "| Registers | 2 × 32 |" in text
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippet.startswith("import register_adapter ")
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(pixel_values=pixels).logits
    done = run_script("run_card_snippet", tmp_path / "my adapter" / "README.md", cwd=tmp_path)
    assert torch.equal(torch.tensor(json.loads(done.stdout)), expected)
