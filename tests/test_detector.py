"""The learned detector: what it reads, that it learns from attention alone, its file, and what it finds."""

from __future__ import annotations

import json
import math
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from families import IMAGE, PATCH, build, make_inputs
from helpers import Snapshot, hooks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score, roc_auc_score

from register_adapter import (
    AdapterFileError,
    MissingExtraError,
    UnsupportedModelError,
    add_registers,
    capture,
    find_tower,
)
from register_adapter.artifacts import AttentionDetector, train_detector
from register_adapter.artifacts.detector import template as detector_template
from register_adapter.artifacts.detector.config import MAX_PARAMETERS, DetectorConfig
from register_adapter.artifacts.detector.features import KINDS, attention_features, reduce_map
from register_adapter.artifacts.detector.template import fit_template
from register_adapter.artifacts.detector.training import calibrate
from register_adapter.testbed import SceneDataset, load_planted_vit, load_vit, plant
from register_adapter.testbed.plant_low import plant_low_norm_artifacts

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIDE = IMAGE // PATCH
FAMILIES = ("vit", "deit", "dinov2", "dinov2-registers", "dinov3", "clip-vision", "beit", "ijepa", "siglip-vision")


def pixels(count, seed, split="train"):
    scenes = SceneDataset(count, seed=seed, split=split)
    stacked = torch.stack([torch.from_numpy(scenes.scene(index).image) for index in range(count)])
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


# What is read of a map


@pytest.mark.parametrize(("num_cls", "first"), [(1, 1), (1, 4), (0, 0), (0, 2), (2, 3)])
def test_a_map_says_what_plain_loops_say(num_cls, first):
    patches, heads = 6, 2
    total = first + patches
    maps = (3 * torch.randn(2, heads, total, total)).softmax(-1)
    reduced = reduce_map(maps, num_cls, first, patches)
    for image in range(2):
        for head in range(heads):
            for p in range(patches):
                row, column = maps[image, head, first + p], maps[image, head, :, first + p]
                others = [column[first + q].item() for q in range(patches) if q != p]
                given = row[first:] / row[first:].sum()
                expected = {
                    "from_patches": math.log(total * sum(others) / len(others) + 1e-3),
                    "from_cls": math.log(total * column[0].item() + 1e-3) if num_cls else None,
                    "to_itself": math.log(total * row[first + p].item() + 1e-3),
                    "to_prefix": math.log(total * row[:first].sum().item() / first + 1e-3) if first else None,
                    "entropy": -sum(v * math.log(v) for v in given.tolist()) - math.log(patches),
                }
                wanted = [expected[kind] for kind in KINDS if expected[kind] is not None]
                assert reduced[image, p, head].tolist() == pytest.approx(wanted, abs=1e-4)


def test_uniform_attention_is_zero():
    reduced = reduce_map(torch.full((1, 2, 9, 9), 1 / 9), 1, 1, 8)
    assert reduced.abs().max() < 2e-3


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("registers", [0, 3])
def test_every_family_gives_finite_values_and_is_left_as_it_was(name, registers):
    model = build(name)
    inputs = {"pixel_values": make_inputs(name)["pixel_values"]}
    if registers:
        model = add_registers(model, num_registers=registers)
    model.train()
    snapshot = Snapshot(model, inputs) if not registers else None
    before = hooks(model)
    (features,) = attention_features(model, [inputs["pixel_values"]])
    blocks = len(find_tower(model).part("blocks"))
    assert features.shape[:4] == (len(inputs["pixel_values"]), SIDE, SIDE, blocks)
    expected = 5 if name not in ("ijepa", "siglip-vision") else 4 if registers else 3
    assert features.shape[-1] == expected
    assert torch.isfinite(features).all()
    assert not features.requires_grad
    assert model.training
    assert hooks(model) == before
    if snapshot is not None:
        snapshot.check()


def test_other_libraries_and_late_registers():
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3
    )
    (features,) = attention_features(model, torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 4, 4, 2, 2, 5)
    late = add_registers(build("siglip-vision"), num_registers=2, insert_layer=1)
    (features,) = attention_features(late, torch.randn(1, 3, IMAGE, IMAGE))
    assert features.shape[-1] == 3, "kinds that only some blocks have are left out"


def test_a_model_is_whole_after_an_exception():
    model = build("vit").train()
    before = hooks(model), model.config._attn_implementation
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the model says of an image with one channel
        list(attention_features(model, [torch.randn(1, 1, IMAGE, IMAGE)]))
    assert (hooks(model), model.config._attn_implementation) == before
    assert model.training


def test_rectangular_images_keep_their_rows_and_columns():
    model = build("vit")
    (features,) = attention_features(model, torch.randn(1, 3, IMAGE, 2 * IMAGE))
    assert features.shape[1:3] == (SIDE, 2 * SIDE)


# The network


@pytest.mark.parametrize(("blocks", "heads"), [(2, 2), (8, 4), (12, 12), (24, 16), (32, 16), (40, 24)])
def test_a_detector_is_small_for_every_size_of_model(blocks, heads):
    config = DetectorConfig(blocks, heads, KINDS)
    detector = AttentionDetector(config)
    assert detector.num_parameters == config.num_parameters(config.width) <= MAX_PARAMETERS


def test_what_is_hidden_is_not_looked_at():
    detector = _random_detector()
    values = torch.randn(1, 6, 6, detector.config.channels)
    hidden = torch.zeros(1, 6, 6, dtype=torch.bool)
    hidden[0, 2, 3] = True
    changed = values.clone()
    changed[0, 2, 3] += 100
    assert torch.equal(detector(values, hidden)[0], detector(changed, hidden)[0])
    changed[0, 2, 4] += 1
    assert not torch.equal(detector(values, hidden)[0][0, 2, 3], detector(changed, hidden)[0][0, 2, 3])


def test_places_are_not_known_but_borders_are():
    detector = _random_detector()
    values = torch.randn(1, 1, 1, detector.config.channels).expand(1, 12, 12, -1)
    location, _ = detector(values, torch.zeros(1, 12, 12, dtype=torch.bool))
    assert torch.allclose(location[0, 4, 4], location[0, 7, 6], atol=1e-5)
    assert not torch.allclose(location[0, 0, 0], location[0, 4, 4], atol=1e-5)


def _random_detector(**options):
    torch.manual_seed(1)
    detector = AttentionDetector(DetectorConfig(2, 2, KINDS, width=8, **options)).eval()
    for parameter in detector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return detector


@pytest.mark.slow
def test_it_cannot_see_norms(trained):
    """The last block's MLP changes every norm at the output and no attention: scores keep their bits."""
    detector, model = trained
    images = pixels(4, 11)
    before = detector.score(model, images)
    out = find_tower(model).block_part(7, "mlp_out")
    kept = out.weight.data.clone()
    out.weight.data.mul_(30)
    after = detector.score(model, images)
    out.weight.data.copy_(kept)
    assert torch.equal(before, after)


# What it finds


@pytest.fixture(scope="module")
def trained():
    model = load_planted_vit().model
    return train_detector(model, pixels(112, 1), num_steps=120, progress=False), model


@pytest.mark.slow
def test_it_finds_planted_artifacts_on_unseen_images(trained):
    detector, model = trained
    images = pixels(96, 30_001, "test")
    truth = load_planted_vit().hits(images)
    scores = detector.score(model, images)
    assert scores.shape == (96, 10, 10)
    assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")
    alone = detector.score(model, images, template=False)
    for values in (scores, alone):
        assert roc_auc_score(truth.flatten(), values.flatten()) > 0.95
    assert detector.has_template
    assert average_precision_score(truth.flatten(), scores.flatten()) > 0.85
    flagged = detector.outliers(scores).flatten(1)
    assert 2 * (flagged & truth).sum() / (flagged.sum() + truth.sum()) > 0.8


@pytest.mark.slow
def test_it_finds_nothing_in_the_clean_twin():
    clean = load_vit()
    detector = train_detector(clean, pixels(96, 1), num_steps=80, progress=False)
    assert not detector.has_template
    assert not detector.outliers(detector.score(clean, pixels(64, 30_001, "test"))).any()


def test_training_repeats_bit_for_bit_and_leaves_no_trace():
    model = build("vit").train()
    images = torch.randn(8, 3, IMAGE, IMAGE)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    snapshot = Snapshot(model.eval(), {"pixel_values": images[:2]})
    first = train_detector(model, images, num_steps=6, progress=False, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    second = train_detector(model, [images[:4], images[4:]], num_steps=6, progress=False, seed=5)
    other = train_detector(model, images, num_steps=6, progress=False, seed=6)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert first.config == second.config
    assert not torch.equal(first.leave.weight, other.leave.weight)
    snapshot.check()


def test_it_trains_in_bfloat16_too():
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        model, images = build("vit"), torch.randn(8, 3, IMAGE, IMAGE)
        rough = train_detector(model, images, num_steps=5, progress=False, mixed_precision="bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    exact = train_detector(model, images, num_steps=5, progress=False)
    assert all(value.dtype == torch.float32 for value in rough.state_dict().values())
    assert not torch.equal(rough.enter.weight, exact.enter.weight)
    assert torch.allclose(rough.score(model, images), exact.score(model, images), atol=0.2)


def test_common_surprises_make_a_template_and_noise_makes_none():
    torch.manual_seed(0)
    detector = AttentionDetector(DetectorConfig(2, 2, KINDS, width=8)).eval()
    features = torch.randn(64, 8, 8, 2, 2, 5)
    assert not fit_template(detector, features[:48], features[48:])
    assert not detector.has_template
    truth = torch.rand(64, 8, 8) < 0.02
    features[truth] += 2.5 * torch.rand(2, 2, 5)
    features[truth] += 1.5
    assert not fit_template(detector, features[:12], features[12:]), "too few to tell"
    assert fit_template(detector, features[:48], features[48:])
    scores = detector.score_features(features)
    calibrate(detector, scores)
    flagged = detector.outliers(scores)
    assert 2 * (flagged & truth).sum() / (flagged.sum() + truth.sum()) > 0.95
    assert detector.config.rule.startswith("auto: ")


def test_a_kind_of_patch_that_is_well_predicted_makes_no_template():
    """A texture: patches alike, in another place of the space of surprises, and each surprise is small."""
    torch.manual_seed(0)
    detector = AttentionDetector(DetectorConfig(2, 2, KINDS, width=8)).eval()
    features = torch.randn(64, 8, 8, 2, 2, 5)
    texture = torch.rand(64, 8, 8) < 0.02
    features[texture] = 0.9 + 0.1 * features[texture]
    assert not fit_template(detector, features[:48], features[48:])
    features[texture] += 1.5
    assert fit_template(detector, features[:48], features[48:])


def test_of_very_many_patches_images_from_first_to_last_are_used(monkeypatch):
    monkeypatch.setattr(detector_template, "_MAX_PATCHES", 1000)
    images = torch.arange(64.0)[:, None, None, None, None, None].expand(64, 8, 8, 2, 2, 5)
    used = detector_template._evenly(images)[:, 0, 0, 0, 0, 0].tolist()
    assert (len(used), used[0], used[-1]) == (15, 0, 63)
    assert used == sorted(set(used))
    assert detector_template._evenly(images[:4]).shape == images[:4].shape


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    detector = AttentionDetector(DetectorConfig(2, 2, KINDS, width=8)).eval()
    features = torch.randn(64, 8, 8, 2, 2, 5)
    with pytest.raises(MissingExtraError, match=r"scikit-learn.*testbed"):
        fit_template(detector, features[:48], features[48:])


@pytest.mark.slow
def test_wrong_models_and_arguments_are_refused(trained):
    detector, model = trained
    with pytest.raises(UnsupportedModelError, match=r"\(8, 4, 5\).*ViT\w+ has \(.*train_detector"):
        detector.score(build("vit"), torch.randn(1, 3, IMAGE, IMAGE))
    with pytest.raises(ValueError, match="blocks, heads, kinds"):
        detector.surprise(torch.zeros(1, 2, 2, 3, 4, 5))
    with pytest.raises(ValueError, match="too few"):
        train_detector(model, pixels(1, 1), progress=False)
    with pytest.raises(ValueError, match="mask_ratio"):
        train_detector(model, pixels(2, 1), mask_ratio=1.0, progress=False)
    with pytest.raises(ValueError, match="different sizes"):
        train_detector(model, [torch.zeros(1, 3, 80, 80), torch.zeros(1, 3, 96, 96)], progress=False)
    with pytest.raises(ValueError, match="no images"):
        detector.score(model, [])


def test_reading_stops_where_memory_ends(caplog):
    model = build("vit")
    images = [torch.randn(2, 3, IMAGE, IMAGE)] * 20
    image_bytes = SIDE * SIDE * math.prod(next(attention_features(model, images)).shape[3:]) * 2
    train_detector(model, images, num_steps=1, max_gib=5 * image_bytes / 2**30, progress=False)
    assert "stopped after 6 images" in caplog.text


# Its file


@pytest.mark.slow
def test_a_saved_detector_is_the_same_one(trained, tmp_path):
    detector, model = trained
    file = detector.save(tmp_path / "new" / "detector.safetensors")
    again = AttentionDetector.load(file)
    assert again.config == detector.config
    assert not again.training
    images = pixels(2, 9)
    assert torch.equal(again.score(model, images), detector.score(model, images))
    assert [path.name for path in file.parent.iterdir()] == ["detector.safetensors"]
    assert file.stat().st_size < 1_000_000
    unlimited = AttentionDetector(DetectorConfig(2, 2, KINDS))
    assert AttentionDetector.load(unlimited.save(tmp_path / "none")).config.threshold == math.inf


def test_a_failed_save_leaves_the_older_file(tmp_path, monkeypatch):
    file = _random_detector().save(tmp_path / "detector.safetensors")
    before = file.read_bytes()

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("register_adapter.artifacts.detector.file.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        _random_detector().save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with pytest.raises(ValueError, match="is a folder"):
        _random_detector().save(tmp_path)


def _header(**changes):
    def change(tensors, values):
        values.update(changes)

    return change


def _tensor(name, value):
    def change(tensors, values):
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_header(format_version=99), "pip install -U"),
        (_header(format_version="1"), "format"),
        (_header(format_version=0), "format 0, which there is not"),
        (_header(blocks=-1), "blocks must be"),
        (_header(blocks=True), "blocks must be"),
        (_header(heads=10**9), "parameters"),
        (_header(depth=10**9), "parameters"),
        (_header(width=10**6), "parameters"),
        (_header(kinds=["norm"]), "kinds must be"),
        (_header(kinds="from_cls"), "kinds must be"),
        (_header(threshold="high"), "threshold must be"),
        (_header(threshold=float("nan")), "threshold must be"),
        (_header(extra=1), "must have the keys"),
        (_header(heads=4), "and not"),
        (_tensor("center", None), "missing tensors"),
        (_tensor("spy", torch.zeros(1)), "unknown tensors"),
        (_tensor("center", torch.full((20,), math.nan)), "not finite"),
        (_tensor("center", torch.zeros(20, dtype=torch.float64)), "float64"),
        (_tensor("spread", torch.zeros(20)), "not above 0"),
    ],
)
def test_hostile_files_are_refused(tmp_path, change, message):
    file = _random_detector().save(tmp_path / "detector.safetensors")
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        values = json.loads(opened.metadata()["register_adapter_detector"])
    change(tensors, values)
    save_file(tensors, file, {"register_adapter_detector": json.dumps(values)})
    with pytest.raises(AdapterFileError, match=message):
        AttentionDetector.load(file)


@pytest.mark.parametrize("content", [b"", b"\x08", pickle.dumps({"a": 1}), b"\xff" * 100])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    file = tmp_path / "detector.safetensors"
    file.write_bytes(content)
    with pytest.raises(AdapterFileError, match="pickled weights are never read"):
        AttentionDetector.load(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(AdapterFileError, match="is not a detector"):
        AttentionDetector.load(file)
    file.write_bytes(_random_detector().save(file).read_bytes()[:-40])
    with pytest.raises(AdapterFileError, match="whole safetensors"):
        AttentionDetector.load(file)


# Artifacts of low norm, and the benchmark


@pytest.fixture(scope="module")
def low_norm():
    """A clean model, its weights before, and its copy with artifacts of half the median norm."""
    clean = load_vit()
    weights = {key: value.clone() for key, value in clean.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        # The images are plain, so the neurons are not made to stand every other view of one.
        patch.setattr(plant, "_VIEWS", plant._VIEWS[:3])
        return clean, weights, plant_low_norm_artifacts(clean, 3, pixels(48, 7), norm=0.5, seed=11)


@pytest.mark.slow
def test_it_finds_low_norm_artifacts_better_than_any_norm(low_norm):
    """Whatever the layer, with high norms or norms far from the median either way as the score."""
    _, _, planting = low_norm
    detector = train_detector(planting.model, pixels(128, 1), num_steps=200, progress=False)
    images = pixels(96, 30_001, "test")
    truth = planting.hits(images).flatten()
    with torch.no_grad(), capture(planting.model, attentions=False) as trace:
        planting.model(pixel_values=images)
    logs = [trace.patches(layer).norm(dim=-1).flatten().log() for layer in range(1, 9)]
    norms = max(roc_auc_score(truth, score) for log in logs for score in (log, -log, (log - log.median()).abs()))
    scores = detector.score(planting.model, images)
    assert roc_auc_score(truth, scores.flatten()) > max(norms, 0.98)
    flagged = detector.outliers(scores).flatten()
    assert 2 * (flagged & truth).sum() / (flagged.sum() + truth.sum()) > 0.7


@pytest.mark.slow
def test_low_norm_artifacts_have_the_norm_asked_for(low_norm):
    clean, weights, planting = low_norm
    images = pixels(32, 40_001, "test")
    hits = planting.hits(images)
    assert 0.003 < hits.float().mean() < 0.08
    with torch.no_grad():
        hidden = planting.model(pixel_values=images, output_hidden_states=True).hidden_states[4][:, 1:]
    norms = hidden.norm(dim=-1)
    assert 0.35 < norms[hits].median() / norms.median() < 0.7
    assert all(torch.equal(value, weights[key]) for key, value in clean.state_dict().items())
    assert all(parameter.requires_grad for parameter in planting.model.parameters())
    with pytest.raises(ValueError, match="norm must be above 0"):
        plant_low_norm_artifacts(clean, norm=0)


@pytest.mark.slow
def test_the_documented_benchmark_writes_a_whole_report(tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "new" / "detector.json", tmp_path / "detector.png"
    arguments = ["--images", "24", "--steps", "3", "--every", "40", "--no-extras", "--out", str(out)]
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["detector.py", *arguments])
    runpy.run_path(str(BENCHMARKS / "detector.py"), run_name="__main__")
    report = json.loads(out.read_text())
    assert {"benchmark", "config", "versions", "hardware", "commit", "results", "targets"} < set(report)
    (result,) = report["results"]
    assert 0 <= result["detector"]["auroc"] <= 1
    assert result["detector"]["parameters"] <= MAX_PARAMETERS
    assert {"norm", "fixed 3 x median", "auto", "two_sided_mad"} < set(result["norm_rules"])
    assert {target["target"] for target in report["targets"]} >= {"ap above every norm rule's"}
    assert "| high | 2 |" in capsys.readouterr().out
    assert not picture.exists()
