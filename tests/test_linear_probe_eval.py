"""Linear classifiers of images on frozen features: scikit-learn's, C from held-out images, the choice written out."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from register_adapter.evaluation import evaluate_knn, evaluate_linear
from register_adapter.evaluation.downstream import LinearFeature, Reading, read_features
from register_adapter.testbed import load_planted_vit, load_vit

FEW = (1e-2, 1.0)


def _pixels(count: int, seed: int) -> tuple[torch.Tensor, list[int]]:
    """Images of two brightnesses, with noise: two classes."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.2 * torch.randn(count, 3, 80, 80, generator=rng) + (labels * 0.08).view(-1, 1, 1, 1)
    return images, labels.tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    return load_planted_vit().model


@pytest.fixture(scope="module")
def report(model: Any) -> Any:
    return evaluate_linear(
        {"planted": model, "clean": load_vit()},
        _pixels(24, 1),
        _pixels(12, 2),
        inverse_penalties=FEW,
        features=(LinearFeature(), LinearFeature(4, True), LinearFeature(9)),
    )


@pytest.mark.parametrize("evaluate", [evaluate_linear, partial(evaluate_knn, k=(1,))], ids=["linear", "knn"])
def test_a_class_without_training_images_is_named(evaluate: Any, model: Any) -> None:
    (train, labels), (test, truth) = _pixels(8, 1), _pixels(6, 2)
    report = evaluate(model, (train, [2 * label for label in labels]), (test, [*truth[:-1], 2]))
    assert report.notes[0] == "no training image is of '1': the 2 test images that are count as wrong"
    whole = evaluate(model, (train, labels), (test, truth))
    assert not any("no training image" in note for note in whole.notes)


@pytest.mark.slow
def test_a_row_is_scikit_learns_classifier_with_the_chosen_penalty(report: Any, model: Any) -> None:
    (train, labels), (test, truth) = _pixels(24, 1), _pixels(12, 2)
    read = [read_features(model, pixels, blocks=4, reading=Reading()) for pixels in (train, test)]
    assert read[0].cls is not None
    assert read[1].cls is not None
    rows = {
        "CLS, last block": [part.cls[:, -1] for part in read],
        "CLS + patch mean, last 4 blocks": [torch.cat([part.cls.flatten(1), part.mean[:, -1]], 1) for part in read],
    }
    for setting, (learned, asked) in rows.items():
        row = report.row("planted", setting)
        reference = make_pipeline(StandardScaler(), LogisticRegression(C=row.chosen["C"], max_iter=300))
        reference.fit(learned.double().numpy(), labels)
        assert row.values == tuple((reference.predict(asked.double().numpy()) == np.array(truth)).astype(float))


@pytest.mark.slow
def test_the_choice_is_written_out(report: Any) -> None:
    for row in report.rows:
        tried = {entry["C"]: entry["accuracy"] for entry in row.chosen["tried"]}
        assert tuple(tried) == FEW
        assert row.chosen["C"] == max(tried, key=lambda value: (tried[value], -value))
        assert row.chosen["held_out"] == 24  # every training image once, and no test image
    written = json.loads(json.dumps(report.to_dict()))
    assert written["models"]["planted"]["norm"] == {"cls": True, "patches": True}
    assert {"max_iter", "seed", "versions", "pixel_values", "classes"} <= set(written["settings"])
    assert written["notes"] == ["a model has 8 blocks: nothing of the last 9"]


def test_a_model_without_cls_has_the_patches_mean() -> None:
    import families

    model = families.build("siglip-vision")
    size = model.config.image_size
    data = [(torch.nn.functional.interpolate(pixels, (size, size)), labels) for pixels, labels in map(_few, (1, 2))]
    report = evaluate_linear(model, *data, inverse_penalties=(1.0,), features=(LinearFeature(), LinearFeature(1, True)))
    assert [row.setting for row in report.rows] == ["patch mean, last block"]


def _few(seed: int) -> tuple[torch.Tensor, list[int]]:
    return _pixels(8, seed)


def test_one_class_is_refused(model: Any) -> None:
    images = _pixels(4, 1)[0]
    with pytest.raises(ValueError, match="two classes"):
        evaluate_linear(model, (images, [0, 0, 0, 0]), (_pixels(2, 2)[0], [0, 0]), features=(LinearFeature(),))
