"""Probes: constructed models with known answers, scikit-learn used directly, and the refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import families
import numpy as np
import pytest
import torch
from crossings import crossings
from helpers import Snapshot, hooks
from torch import nn
from torch.nn import functional as F

from register_adapter import MissingExtraError, UnsupportedModelError, add_registers, capture
from register_adapter.artifacts import Threshold
from register_adapter.evaluation import probe_tokens
from register_adapter.evaluation.estimate import mean_over_images
from register_adapter.evaluation.linear_models import (
    INVERSE_PENALTIES,
    PENALTIES,
    _folds,
    fit_classifier,
    fit_regression,
)
from register_adapter.evaluation.probes.fitting import _split
from register_adapter.evaluation.probes.samples import TokenSampler
from register_adapter.features.passes import open_pass
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit, load_vit

pytest.importorskip("sklearn")

SIDE, PATCH, CLASSES = 4, 2, 4
PLACES, PIXELS = SIDE**2, 3 * PATCH**2


class _Embeddings(nn.Module):
    """Writes into each token exactly what a test wants to find there.

    The last column of an image is seen by no patch. It says the class, and which two patches are outliers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Conv2d(3, PIXELS, PATCH, PATCH, bias=False)
        self.patch_embeddings.projection.weight.data = torch.eye(PIXELS).reshape(PIXELS, 3, PATCH, PATCH)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixels = self.patch_embeddings.projection(pixel_values).flatten(2).transpose(1, 2)
        hidden = pixel_values[:, 0, :3, -1].long()
        place = torch.eye(PLACES)[: pixels.shape[1]].expand(len(pixels), -1, -1)
        label = F.one_hot(hidden[:, 0], CLASSES).float()
        tokens = torch.cat([place, pixels, torch.zeros(*pixels.shape[:2], CLASSES)], dim=2)
        for row, (_, *spots) in enumerate(hidden.tolist()):
            for spot in spots:
                if 0 <= spot < tokens.shape[1]:
                    tokens[row, spot] = 0
                    tokens[row, spot, -CLASSES:] = 30 * label[row]
        cls = torch.cat([torch.zeros(len(pixels), PLACES + PIXELS), label], dim=1)
        return torch.cat([cls[:, None], tokens], dim=1)


class ViTModel(nn.Module):
    """A tower by its name: blocks that do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.layernorm = _Embeddings(), nn.Identity()
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.layernorm(hidden)


THRESHOLD = Threshold("fixed", high=15.0, separated=True)


def _images(count: int, seed: int = 0, outliers: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIDE * PATCH, SIDE * PATCH + 1, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    spots = torch.rand(count, PLACES, generator=generator).argsort(1)[:, :2] if outliers else torch.full((count, 2), -1)
    images[:, 0, 0, -1] = labels.float()
    images[:, 0, 1:3, -1] = spots.float()
    return images, labels


def _batches(images: torch.Tensor, size: int = 32) -> Iterator[torch.Tensor]:
    return iter(images.split(size))


def _draw(model: nn.Module, images: Any, *rest: Any) -> Any:
    opened = open_pass(model, images, with_labels=True)
    sampler = TokenSampler(opened.tower, opened.registers, *rest)
    opened.run(sampler)
    return sampler.samples()


# Known answers


@pytest.fixture(scope="module")
def known() -> Any:
    images, labels = _images(400)
    return probe_tokens(ViTModel(), _batches(images), labels.tolist(), threshold=THRESHOLD)


@pytest.mark.slow
def test_tokens_that_hold_their_place_exactly_are_found_there(known: Any) -> None:
    normal, outlier = known.row("normal"), known.row("outlier")
    assert normal.position_top1.value == 1.0
    assert normal.position_distance.value == 0.0
    assert normal.position_top1.constant < 0.15
    # An outlier says nothing of its place: no better than a guess.
    assert outlier.position_top1.value < 0.2
    assert outlier.position_distance.value > 1.2
    assert known.grid == (SIDE, SIDE)


@pytest.mark.slow
def test_tokens_that_hold_their_pixels_are_reconstructed(known: Any) -> None:
    normal, outlier = known.row("normal").reconstruction_l2, known.row("outlier").reconstruction_l2
    assert normal.value < 0.05
    assert normal.constant == pytest.approx(PIXELS**0.5, rel=0.1)  # standard normal pixels
    assert outlier.value == pytest.approx(outlier.constant, rel=0.1)


def test_outliers_that_carry_the_class_tell_it_and_normal_tokens_do_not(known: Any) -> None:
    assert known.row("outlier").classification.value == 1.0
    assert known.row("CLS").classification.value == 1.0
    normal = known.row("normal").classification
    assert normal.value < 0.45
    assert normal.estimate.num_images == 120
    assert known.difference["classification"].value == pytest.approx(1 - normal.value)
    assert known.difference["position_top1"].value < -0.8


def test_counts_are_equal_and_in_the_table(known: Any) -> None:
    assert (known.num_images, known.num_patches, known.num_outliers) == (400, 400 * PLACES, 800)
    rows = [known.row(name) for name in ("normal", "outlier")]
    assert [(row.num_images, row.num_tokens) for row in rows] == [(400, 800)] * 2
    assert rows[0].position_top1.num_train == 2 * 280
    assert known.row("CLS").position_top1 is None
    text = known.to_markdown()
    assert text.startswith("| token | images | tokens | position top-1")
    assert "| outlier | 400 | 800 |" in text
    assert "constant" in json.loads(json.dumps(known.to_dict()))["rows"][0]["position_top1"]
    assert (known.layer, known.num_layers) == (2, 3)


def test_a_shared_probe_is_learned_from_all_tokens_in_their_proportion() -> None:
    images, labels = _images(200)
    report = probe_tokens(
        ViTModel(), _batches(images), labels.tolist(), threshold=THRESHOLD, local_probe="shared", tasks=("position",)
    )
    normal, outlier = (report.row(name).position_top1 for name in ("normal", "outlier"))
    # 2 of 16 patches are outliers: 280 normal training tokens go with 40 of them.
    assert normal.num_train == outlier.num_train == 280 + 40
    assert normal.value == 1.0
    assert outlier.value < 0.2


@pytest.mark.slow
def test_the_size_of_batches_and_a_second_run_make_no_difference() -> None:
    images, labels = _images(60)

    def run(size: int) -> Any:
        options: dict[str, Any] = {"threshold": THRESHOLD, "min_images": 20, "max_samples": 40, "seed": 3}
        return probe_tokens(ViTModel(), _batches(images, size), labels.tolist(), **options).to_dict()

    first = run(7)
    assert first == run(7) == run(60)
    images, labels = _images(60, outliers=True)
    other = probe_tokens(
        ViTModel(), _batches(images), labels.tolist(), threshold=THRESHOLD, min_images=20, seed=4
    ).to_dict()
    assert other["rows"] != first["rows"]


# Outliers that are too few


@pytest.mark.parametrize("threshold", [THRESHOLD, None])
@pytest.mark.slow
def test_too_few_outliers_give_a_sentence_and_no_figure(threshold: Threshold | None) -> None:
    images, labels = _images(60, outliers=False)
    images[:5, 0, 1, -1] = 3.0
    report = probe_tokens(ViTModel(), _batches(images), labels.tolist(), threshold=threshold, min_images=20)
    row = report.row("outlier")
    assert row.classification is row.position_top1 is row.reconstruction_l2 is None
    count = 5 if threshold else 0
    assert row.note == f"not enough outlier tokens ({count} found, in {count} images; 20 images with some needed)"
    assert report.row("normal").num_images == 60
    assert report.row("CLS").classification.value > 0.9
    assert report.difference == {}
    assert row.note in report.to_markdown()


@pytest.mark.slow
def test_images_without_outliers_are_left_out_of_every_row() -> None:
    images, labels = _images(60)
    images[20:, 0, 1:3, -1] = -1
    report = probe_tokens(ViTModel(), _batches(images), labels.tolist(), threshold=THRESHOLD, min_images=20)
    assert report.num_images_with_outliers == 20
    assert {row.num_images for row in report.rows} == {20}


# The draw


def test_what_is_kept_of_an_image_is_what_the_model_computed() -> None:
    planted = load_planted_vit().model
    scenes, processor = SceneDataset(24, seed=11, split=None), load_image_processor()
    pixels = processor([item["image"] for item in scenes], return_tensors="pt")["pixel_values"]
    with torch.no_grad(), capture(planted, attentions=False) as trace:
        planted(pixel_values=pixels)
    norms = trace.patches(6).norm(dim=-1)
    threshold = Threshold("fixed", high=3 * norms.median().item())
    samples = _draw(planted, _batches(pixels, 24), threshold, 6, True, 2, 100, 0)
    mask = norms > threshold.high
    assert samples.num_outliers == int(mask.sum()) > 0
    assert samples.num_images_with_both == int(mask.any(1).sum())
    assert {sample.image for sample in samples.with_both} == set(mask.any(1).nonzero().flatten().tolist())
    patches = F.unfold(pixels, 8, stride=8).transpose(1, 2)
    for sample in samples.with_both + samples.plain:
        assert torch.equal(torch.from_numpy(sample.prefix), trace.hidden_states[6][sample.image, :1])
        for kind, places in sample.places.items():
            assert len(set(places)) == len(places) <= 2
            assert (mask[sample.image, places] == (kind == "outlier")).all()
            assert torch.equal(torch.from_numpy(sample.patches[kind]), trace.patches(6)[sample.image, places])
            assert torch.equal(torch.from_numpy(sample.pixels[kind]), patches[sample.image, places])
        sizes = {kind: len(places) for kind, places in sample.places.items()}
        assert set(sizes.values()) == {min(2, int(mask[sample.image].sum()))} or set(sizes) == {"normal"}


@pytest.mark.slow
def test_a_long_stream_leaves_a_uniform_sample_and_no_views() -> None:
    images, _ = _images(300)
    counts = np.zeros(300)
    for seed in range(40):
        samples = _draw(ViTModel(), _batches(images, 100), THRESHOLD, 2, False, 1, 30, seed)
        assert len(samples.with_both) == 30
        assert samples.num_images_with_both == 300
        drawn = [sample.image for sample in samples.with_both]
        assert len(set(drawn)) == 30
        counts[drawn] += 1
    # 400 draws for each third of the stream.
    assert all(330 < third.sum() < 470 for third in np.split(counts, 3))
    sample = samples.with_both[0]
    kept = [sample.prefix, *sample.patches.values()]
    assert all(array.base is None or array.base.nbytes == array.nbytes for array in kept)


# Against scikit-learn


@dataclass
class Probed:
    """Probes of the shipped model, and what they were trained on: 120 scenes, 3 tokens of each."""

    report: Any
    model: Any
    pixels: torch.Tensor
    labels: Any
    #: Images of the test part, ``(120,)``.
    test: Any


@pytest.fixture(scope="module")
def probed() -> Probed:
    model, processor = load_vit(), load_image_processor()
    scenes = list(SceneDataset(120, seed=5, split=None))
    labels = np.array([item["label"] % 3 for item in scenes])
    pixels = processor([item["image"] for item in scenes], return_tensors="pt")["pixel_values"]
    options: dict[str, Any] = {"layer": 5, "min_images": 20, "tokens_per_image": 3, "seed": 2}
    report = probe_tokens(model, [pixels[:64], pixels[64:]], labels.tolist(), **options)
    return Probed(report, model, pixels, labels, _split(120, 0.3, 2))


@dataclass
class Drawn:
    """What was kept of the normal tokens of ``Probed``."""

    #: Scaled with the mean and the spread of the training part, ``(360, d)``.
    features: Any
    #: ``(360, values of a patch)``.
    pixels: Any
    #: ``(360,)``.
    places: Any
    #: Tokens of the test part, ``(360,)``.
    test: Any


@pytest.fixture(scope="module")
def drawn(probed: Probed) -> Drawn:
    samples = sorted(
        _draw(probed.model, [probed.pixels], None, 5, True, 3, 1000, 2).plain, key=lambda sample: sample.image
    )
    features, pixels, places = (
        np.concatenate([getattr(sample, name)["normal"] for sample in samples])
        for name in ("patches", "pixels", "places")
    )
    test = np.repeat(probed.test, 3)
    return Drawn(_scaled(features.astype(np.float64), ~test), pixels, places, test)


def _scaled(features: Any, train: Any) -> Any:
    from sklearn.preprocessing import StandardScaler

    return StandardScaler().fit(features[train]).transform(features)


@pytest.mark.slow
def test_classification_agrees_with_scikit_learn_on_tokens_read_with_capture(probed: Probed) -> None:
    from sklearn.linear_model import LogisticRegression

    states = []
    for batch in (probed.pixels[:64], probed.pixels[64:]):
        with torch.no_grad(), capture(probed.model, attentions=False) as trace:
            probed.model(pixel_values=batch)
        states.append(trace.hidden_states[5][:, 0])
    test, labels, score = probed.test, probed.labels, probed.report.row("CLS").classification
    features = _scaled(torch.cat(states).double().numpy(), ~test)
    direct = LogisticRegression(C=score.penalty, max_iter=300).fit(features[~test], labels[~test])
    assert score.value == direct.score(features[test], labels[test])
    assert score.constant == np.mean(labels[test] == np.bincount(labels[~test]).argmax())


@pytest.mark.slow
def test_reconstruction_agrees_with_scikit_learn(probed: Probed, drawn: Drawn) -> None:
    from sklearn.linear_model import Ridge

    score, train = probed.report.row("normal").reconstruction_l2, ~drawn.test
    direct = Ridge(score.penalty).fit(drawn.features[train], drawn.pixels[train].astype(np.float64))
    errors = direct.predict(drawn.features[drawn.test]) - drawn.pixels[drawn.test]
    assert score.value == pytest.approx(np.linalg.norm(errors, axis=1).mean(), rel=1e-5)


@pytest.mark.slow
def test_positions_agree_with_scikit_learn(probed: Probed, drawn: Drawn) -> None:
    from sklearn.linear_model import LogisticRegression

    top1, distance = probed.report.row("normal").position_top1, probed.report.row("normal").position_distance
    places, part = drawn.places, drawn.test
    direct = LogisticRegression(C=top1.penalty, max_iter=300).fit(drawn.features[~part], places[~part])
    predicted = direct.predict(drawn.features[part])
    assert top1.value == pytest.approx(np.mean(predicted == places[part]), abs=0.01)
    apart = np.hypot(predicted // 10 - places[part] // 10, predicted % 10 - places[part] % 10)
    assert distance.value == pytest.approx(apart.mean(), abs=0.1)


def test_penalties_are_chosen_on_training_data_as_by_a_plain_search() -> None:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 20))
    truth = x @ rng.normal(size=(20, 3))
    classes = (truth + 6 * rng.gumbel(size=truth.shape)).argmax(1)
    images = np.arange(300) // 3
    folds = list(GroupKFold(5).split(x, groups=images))
    thirds = list(GroupKFold(3).split(x, groups=images))
    fitted = fit_classifier(x, classes, images)

    def accuracy(inverse: float) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=inverse, max_iter=300))
        scores = [model.fit(x[fit], classes[fit]).score(x[test], classes[test]) for fit, test in thirds]
        return float(np.mean(scores))

    assert accuracy(fitted.penalty) == max(map(accuracy, INVERSE_PENALTIES))
    assert fitted.converged
    assert not fit_classifier(x, classes, images, max_iter=2).converged

    targets = truth + 8 * rng.normal(size=truth.shape)
    regression = fit_regression(x, targets, images)
    scaled = StandardScaler().fit_transform(x)
    search = GridSearchCV(Ridge(), {"alpha": PENALTIES}, cv=folds, scoring="neg_mean_squared_error")
    assert regression.penalty == search.fit(scaled, targets).best_params_["alpha"]
    np.testing.assert_allclose(regression.predict(x), search.predict(scaled), rtol=1e-6)


def test_a_weak_penalty_is_chosen_where_what_is_asked_for_hides_behind_what_varies_more() -> None:
    rng = np.random.default_rng(0)
    places, shared = rng.normal(size=(36, 32)), rng.normal(size=(6, 32))

    def draw(count: int) -> tuple[Any, Any, Any]:
        images, place = np.repeat(np.arange(count), 4), rng.integers(36, size=4 * count)
        content = 3 * rng.normal(size=(4 * count, 6)) @ shared
        return 0.15 * places[place] + content + 0.03 * rng.normal(size=content.shape), place, images

    fitted = fit_classifier(*draw(80))
    x, place, _ = draw(200)
    assert (fitted.predict(x) == place).mean() > 0.7


def test_folds_are_over_images_and_no_more_than_are_needed() -> None:
    def folds(count: int, per_image: int = 4) -> list[Any]:
        images = np.repeat(np.arange(count), per_image)
        made = list(_folds(images % 2, images))
        assert all(not set(images[learned]) & set(images[held_out]) for learned, held_out in made)
        return made

    assert [len(folds(count)) for count in (5, 100, 500, 2000)] == [3, 3, 1, 1]
    images = np.array([0, 0, 1, 2])
    assert len(list(_folds(np.array([0, 0, 0, 1]), images))) == 2  # without image 2 there is one class
    with pytest.raises(ValueError, match="two images"):
        fit_classifier(np.eye(4), np.array([0, 1, 0, 1]), np.zeros(4, int))


def test_the_standard_error_is_over_images() -> None:
    values = np.random.default_rng(0).normal(size=40)
    estimate = mean_over_images(values)
    assert estimate.standard_error == pytest.approx(values.std(ddof=1) / 40**0.5)
    assert estimate.interval == pytest.approx(
        (estimate.value - 1.96 * estimate.standard_error, estimate.value + 1.96 * estimate.standard_error)
    )
    # Copies of a token in the same image tell nothing new.
    copied = mean_over_images(np.repeat(values, 5), np.repeat(np.arange(40), 5))
    assert copied.standard_error == pytest.approx(estimate.standard_error)
    assert (copied.num_images, copied.num_tokens) == (40, 200)
    # Images of unequal size: as drawing images again and again says.
    rng = np.random.default_rng(1)
    images = np.repeat(np.arange(60), rng.integers(1, 6, 60))
    values = rng.normal(size=60)[images] + rng.normal(size=len(images)) + 3
    sums, sizes = np.bincount(images, values), np.bincount(images)
    drawn = rng.integers(60, size=(4000, 60))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    assert mean_over_images(values, images).standard_error == pytest.approx(means.std(), rel=0.06)
    with pytest.raises(ValueError, match="at least one value"):
        mean_over_images([])


# Real models


CASES = {
    "vit": ["CLS"],
    "deit": ["CLS", "CLS 2"],
    "clip-vision": ["CLS"],
    "siglip-vision": [],
    "dinov2-registers": ["CLS", *(f"native register {number}" for number in range(3))],
    "dinov3": ["CLS", *(f"native register {number}" for number in range(3))],
}


@pytest.mark.parametrize(("name", "registers"), crossings([name for name in CASES if name in families.CASES], (0, 2)))
@pytest.mark.slow
def test_every_kind_of_token_of_a_real_model_has_a_row(name: str, registers: int) -> None:
    model = families.build(name)
    if registers:
        model = add_registers(model, registers).eval()
    pixels = families.make_inputs(name, batch=24)["pixel_values"]
    before = hooks(model)
    threshold = Threshold("fixed", high=float(_norms(model, pixels).median()))
    batches = [{"pixel_values": part, "labels": torch.arange(12) % 2} for part in pixels.split(12)]
    report = probe_tokens(model, batches, threshold=threshold, min_images=10, max_iter=30)
    native = families.CASES[name].family in ("dinov2_with_registers", "dinov3_vit")
    expected = CASES[name] if native or "native" not in str(CASES[name]) else CASES[name][:1]
    names = ["normal", "outlier", *expected, *(f"register {number}" for number in range(registers))]
    assert [row.tokens for row in report.rows] == names
    assert all(row.classification is not None for row in report.rows)
    assert report.grid == (4, 4)
    assert report.num_patches == 24 * 16
    assert hooks(model) == before


def _norms(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), capture(model, attentions=False) as trace:
        model(pixel_values=pixels)
    return trace.patches().norm(dim=-1)


STACKS = {
    "timm-registers": ["CLS", *(f"native register {number}" for number in range(3))],
    "timm-registers-only": [f"native register {number}" for number in range(3)],
    "dinov3-timm": ["CLS", "native register 0", "native register 1"],
    "deit-distilled": ["CLS", "CLS 2"],
    "open_clip": ["CLS"],
    "torchvision": ["CLS"],
    "hub-registers": ["CLS", *(f"native register {number}" for number in range(3))],
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.slow
def test_models_of_other_libraries_too(name: str) -> None:
    stacks = pytest.importorskip("stacks_cases")
    model = add_registers(stacks.build_stack(name), 2).eval()
    pixels = stacks.images(batch=24)
    report = probe_tokens(model, [(pixels[:12], [0, 1] * 6), (pixels[12:], [1, 0] * 6)], min_images=10, max_iter=30)
    names = ["normal", "outlier", *STACKS[name], "register 0", "register 1"]
    assert [row.tokens for row in report.rows] == names
    assert report.grid == (4, 4)


@pytest.mark.slow
def test_the_planted_vit() -> None:
    """Figures of the shipped model are in docs/probes.md; here, that they are figures."""
    model, processor = load_planted_vit().model, load_image_processor()
    scenes = list(SceneDataset(180, seed=21, split=None))
    parts = [scenes[:40], scenes[40:110], scenes[110:]]
    pixels = [processor([item["image"] for item in part], return_tensors="pt")["pixel_values"] for part in parts]
    labels = [torch.tensor([item["label"] for item in part]) for part in parts]
    threshold = Threshold("fixed", high=3 * float(_norms(model, pixels[0]).median()))  # on images that are not probed
    snapshot = Snapshot(model, {"pixel_values": pixels[0][:2]})
    report = probe_tokens(
        model.train(), list(zip(pixels[1:], labels[1:], strict=True)), threshold=threshold, min_images=35
    )
    assert model.training
    model.eval()
    snapshot.check()
    assert [row.tokens for row in report.rows] == ["normal", "outlier", "CLS"]
    assert 0.005 < report.num_outliers / report.num_patches < 0.06
    assert report.row("CLS").classification.value > 3 * report.row("CLS").classification.constant
    normal = report.row("normal").reconstruction_l2
    assert normal.value < 0.8 * normal.constant
    for row in report.rows:
        low, high = row.classification.estimate.interval
        assert low <= row.classification.value <= high


# Refusals


def test_places_that_are_not_known_are_refused_and_classification_still_works() -> None:
    for name in ("siglip2-vision", "mae", "videomae"):
        if name not in families.CASES:
            continue
        model, inputs = families.build(name), families.make_inputs(name, batch=24)
        with pytest.raises(UnsupportedModelError, match=r"patches of .* lie is not known.*classification"):
            probe_tokens(model, [inputs], min_images=10)
        assert not hooks(model)
        report = probe_tokens(model, [inputs], [0, 1] * 12, tasks=("classification",), min_images=10)
        assert report.grid is None
        assert report.row("normal").classification is not None


def test_mae_with_its_patches_in_order_is_probed() -> None:
    model, inputs = families.build("mae"), families.make_inputs("mae", batch=24)
    inputs["noise"] = torch.arange(16.0).expand(24, -1)
    assert probe_tokens(model, [inputs], min_images=10).row("normal").position_top1 is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("depth",)}, r"unknown tasks \['depth'\]"),
        ({"tasks": ("classification",)}, "classification needs labels"),
        ({"layer": 7}, "layer=7 of 3"),
        ({"local_probe": "both"}, "local_probe must be"),
        ({"test_share": 1.5}, r"test_share=1\.5"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    model = ViTModel()
    with pytest.raises(ValueError, match=message):
        probe_tokens(model, [_images(40)[0]], **{"min_images": 10, **options})
    assert not hooks(model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda images, labels: ([images], [0, 1, 2]), "labels has 3 entries"),
        (lambda images, labels: ([(images, labels)], labels.tolist()), "given twice"),
        (lambda images, labels: ([images], [1] * 40), "two classes"),
        (lambda images, labels: ([],), "no images"),
        (lambda images, labels: ([images[:5]],), "at least 10 images"),
        (lambda images, labels: ([images, images[:, :, :4]],), "several sizes"),
        (lambda images, labels: (["a.png"],), "image_processor="),
        (lambda images, labels: ([images], ["cat"] * 40), "numbers of classes"),
        (lambda images, labels: ([(images, labels[:3])],), "one per image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_and_labels_that_make_no_sense_are_refused(given: Callable[..., tuple[Any, ...]], message: str) -> None:
    model = ViTModel()
    with pytest.raises(ValueError, match=message):
        probe_tokens(model, *given(*_images(40)), min_images=10)
    assert not hooks(model)


def test_the_model_is_as_before_after_an_exception() -> None:
    model = families.build("vit").train()
    before = hooks(model)

    def stream() -> Iterator[torch.Tensor]:
        yield torch.zeros(2, 3, 32, 32)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        probe_tokens(model, stream())
    assert hooks(model) == before
    assert model.training


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = _images(40)
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match="scikit-learn"):
        probe_tokens(ViTModel(), [images], labels.tolist(), min_images=10)
