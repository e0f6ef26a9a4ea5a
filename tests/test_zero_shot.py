"""Zero-shot classification: the model's own probabilities, names and templates, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import KINDS, make_tokenizer, write_pair

from register_adapter import UnsupportedModelError, add_registers
from register_adapter.data.texts import TextTokenizer
from register_adapter.evaluation import evaluate_zero_shot
from register_adapter.evaluation.downstream import read_classes, read_templates
from register_adapter.testbed import load_vit


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import transformers as tf

    folder = write_pair(tmp_path_factory.mktemp("pair"), request.param)
    return {"clip": tf.CLIPModel, "siglip": tf.SiglipModel}[request.param].from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_the_class_is_the_models_own_likeliest(model: Any, images: torch.Tensor) -> None:
    names = ["red circle", "green ring", "blue star"]
    tokens = TextTokenizer.of(model)([f"a photo of {name}" for name in names])
    with torch.no_grad():
        said = model(pixel_values=images, **tokens).logits_per_image.argmax(1)
    labels = [0, 1, 2] * 4
    report = evaluate_zero_shot(model, (images, labels), names, templates=("a photo of {}",), batch_size=5)
    assert report.rows[0].values == tuple((said == torch.tensor(labels)).double().tolist())
    assert report.rows[0].setting == "1 template"
    written = json.loads(json.dumps(report.to_dict()))
    assert written["settings"]["classes"] == {str(n): [name] for n, name in enumerate(names)}
    assert (written["num_train"], written["num_test"]) == (0, 12)


def test_an_adapter_beside_its_base(model: Any, images: torch.Tensor) -> None:
    import copy

    adapted = add_registers(copy.deepcopy(model), num_registers=2, init_std=3.0)
    names = {"0": "red circle", "1": ["green ring", "green star"], "2": "blue star", "never": "yellow cross"}
    data = images, [0, 1, 2] * 4
    report = evaluate_zero_shot({"base": (adapted, None), "default": (adapted, "default")}, data, names)
    assert report.rows[0].values == evaluate_zero_shot(model, data, names).rows[0].values
    assert report.rows[1].difference is not None
    assert report.rows[0].chosen == {"templates": 7, "classes": 4}
    assert [report.models[name]["registers"] for name in ("base", "default")] == [0, 2]


@pytest.mark.parametrize("template", ["{{}}", "{ {} }", "{0} {}", "{x} a {}", "{} %s {0.__class__}"])
def test_other_braces_of_a_template_are_text(model: Any, images: torch.Tensor, template: str) -> None:
    names, words = ["red circle", "green ring", "blue star"], TextTokenizer.of(model)
    with torch.no_grad():
        tokens = words([template.replace("{}", name) for name in names])
        said = model(pixel_values=images, **tokens).logits_per_image.argmax(1)
    report = evaluate_zero_shot(model, (images, [0, 1, 2] * 4), names, templates=(template,))
    assert report.rows[0].values == tuple((said == torch.tensor([0, 1, 2] * 4)).double().tolist())


def test_names_from_files(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    for content, read in (
        ({"a": "tench", "b": ["x", "y"]}, {"a": ["tench"], "b": ["x", "y"]}),
        (["u", "v"], ["u", "v"]),
    ):
        path.write_text(json.dumps(content))
        assert read_classes(path) == read
    for wrong in ("{", "3", '{"a": []}', '["", "b"]'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"classes\.json"):
            read_classes(path)
    (tmp_path / "t.txt").write_text("a {}\n\nthe {}\n")
    assert read_templates(tmp_path / "t.txt") == ["a {}", "the {}"]
    path.write_text('["a {}"]')
    assert read_templates(path) == ["a {}"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"templates": ("a photo",)}, "every template needs one"),
        ({"templates": ()}, "every template needs one"),
        ({"classes": {"0": "red"}}, "classes names none of 1, 2"),
        ({"classes": ["red", "green", "blue", "1"]}, r"among them \['1'\], which another class is called"),
        ({"classes": ["red"]}, "1 names, and images are of 3 classes"),
    ],
)
def test_what_is_refused(images: torch.Tensor, model: Any, change: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        evaluate_zero_shot(model, (images, [0, 1, 2] * 4), **change)


def test_a_model_without_texts_is_refused(images: torch.Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="does not embed images and texts"):
        evaluate_zero_shot(load_vit(), (images, [0, 1, 2] * 4))


def test_open_clip(images: torch.Tensor) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=2)
    model = open_clip.CLIP(16, vision, text).eval()
    with pytest.raises(ValueError, match="give tokenizer="):
        evaluate_zero_shot(model, (images, [0, 1, 2] * 4))
    own = TextTokenizer(make_tokenizer(), model.context_length)
    report = evaluate_zero_shot(
        model, (images, [0, 1, 2] * 4), ["red", "green", "blue"], tokenizer=lambda texts: own(texts)["input_ids"]
    )
    assert len(report.rows[0].values) == 12
