"""The shipped ViT, and planted artifacts: a known defect with the published signature, and a clean twin."""

import json

import pytest
import torch
from families import TOWERS, build
from torch.nn import functional as F

from register_adapter import capture, find_tower
from register_adapter.artifacts import neighbour_similarity, patch_norms, summarise_norms
from register_adapter.testbed import (
    SceneDataset,
    load_image_processor,
    load_planted_vit,
    load_vit,
    plant_artifacts,
    random_registers,
)
from register_adapter.testbed.vit import WEIGHTS


def pixels(count, seed, split="test", size=80):
    scenes = [SceneDataset(count, size=size, seed=seed, split=split).scene(index) for index in range(count)]
    stacked = torch.stack([torch.from_numpy(scene.image) for scene in scenes]).permute(0, 3, 1, 2)
    return stacked.float() / 127.5 - 1, torch.tensor([scene.label for scene in scenes])


@pytest.fixture(scope="module")
def planting():
    return load_planted_vit()


@pytest.fixture(scope="module")
def held_out():
    return pixels(128, 20_001)


def test_the_weights_are_small_safetensors():
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 4_000_000
    assert not [file for file in WEIGHTS.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.slow
@torch.no_grad()
def test_the_recorded_accuracy_is_the_shipped_model_s(held_out):
    recorded = json.loads((WEIGHTS / "results.json").read_text())["accuracy"]
    pixel_values, labels = held_out
    accuracy = (load_vit()(pixel_values).logits.argmax(-1) == labels).float().mean().item()
    error = 3 * (recorded * (1 - recorded) / len(labels)) ** 0.5 + 0.02
    assert abs(accuracy - recorded) < error


def test_the_image_processor_does_what_the_model_was_trained_with():
    scene = SceneDataset(1, seed=5, split=None).scene(0)
    made = load_image_processor()(images=scene.pil, return_tensors="pt")["pixel_values"]
    expected = torch.from_numpy(scene.image).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert torch.allclose(made, expected, atol=1e-5)


@pytest.mark.slow
def test_the_clean_twin_has_no_outliers(held_out):
    clean = load_vit()
    with torch.no_grad(), capture(clean, attentions=False) as trace:
        clean(pixel_values=held_out[0])
    for layer in range(1, 9):  # 0 is the input of the first block, where norms follow the contrast of the patch
        assert summarise_norms(trace.patches(layer).norm(dim=-1)).share == 0


@pytest.mark.slow
def test_planted_artifacts_have_the_published_signature(planting, held_out):
    pixel_values, _ = held_out
    tower = find_tower(planting.model)
    with torch.no_grad(), capture(planting.model, attentions=False) as trace:
        planting.model(pixel_values=pixel_values)
    hits = planting.hits(pixel_values)
    assert 0.008 < hits.float().mean() < 0.05, "about 2 % of the patches"
    assert hits.any(1).float().mean() > 0.3, "in many of the images"
    for layer in range(len(trace.hidden_states)):
        norms = trace.patches(layer).norm(dim=-1)
        ratio = norms / norms.median()
        if layer <= planting.block:
            assert layer == 0 or ratio.max() < 3, "nothing before that block"
            continue
        assert ratio[hits].median() > 5, "at least 5 times the median norm, from that block on"
        between = ((ratio > 2) & (ratio < 4)).float().mean()
        assert between < 0.1 * hits.float().mean(), "two modes and little between them"
        assert torch.equal(ratio > 3, hits) or ((ratio > 3) != hits).float().mean() < 0.002
    similarity = neighbour_similarity(tower, pixel_values).flatten(1)
    assert similarity[hits].median() > similarity.median(), "on patches similar to their neighbours"


@pytest.mark.slow
def test_planted_artifacts_survive_four_random_registers(planting, held_out):
    before = summarise_norms(patch_norms(planting.model, [held_out[0]])).share
    assert before > 0
    for seed in range(2):
        with random_registers(planting.model, 4, std=0.02, seed=seed) as probed:
            assert summarise_norms(patch_norms(probed, [held_out[0]])).share >= 0.8 * before


def test_the_probe_leaves_the_model_as_it_was(planting, held_out):
    keys, before = list(planting.model.state_dict()), planting.model(held_out[0][:2]).logits
    with random_registers(planting.model, 4) as probed:
        assert not torch.equal(probed(held_out[0][:2]).logits, before)
    assert list(planting.model.state_dict()) == keys
    assert torch.equal(planting.model(held_out[0][:2]).logits, before)
    assert all(parameter.requires_grad for parameter in planting.model.parameters())


def test_planting_changes_nothing_but_the_planted_units(planting):
    clean, planted = load_vit().state_dict(), planting.model.state_dict()
    changed = {key for key in clean if not torch.equal(clean[key], planted[key])}
    tower, names = find_tower(planting.model), {module: name for name, module in planting.model.named_modules()}
    inside, out = (names[tower.block_part(planting.block, field)] for field in ("mlp_in", "mlp_out"))
    assert changed == {f"{inside}.weight", f"{inside}.bias", f"{out}.weight"}
    columns = (clean[f"{out}.weight"] != planted[f"{out}.weight"]).any(0).nonzero().flatten()
    assert set(columns.tolist()) <= set(planting.neurons)


@pytest.mark.parametrize("name", TOWERS)
def test_any_family_can_be_planted(name):
    model = build(name)
    if find_tower(model).block_part(0, "mlp_in") is None:
        pytest.skip("both halves of its gated MLP are one layer in this version of transformers")
    if not isinstance(find_tower(model).part("patch_embedding"), torch.nn.Conv2d):
        pytest.skip("without a convolution over the image patches have no known neighbours")
    if name == "mae":
        pytest.skip("it hides patches at random: what is hit has another place in every pass")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pixel_values, _ = pixels(48, 3, "train", size=32)
    planting = plant_artifacts(model, 0, pixel_values, share=0.06, strength=8, attraction_steps=2)
    hits = planting.hits(pixel_values)
    assert 0.005 < hits.float().mean() < 0.15
    with torch.no_grad(), capture(planting.model, attentions=False) as trace:
        planting.model(pixel_values=pixel_values)
    norms = trace.patches().norm(dim=-1)
    assert norms[hits].median() > 5 * norms[~hits].median()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the twin is untouched"


def test_neighbour_similarity_is_the_mean_over_existing_neighbours():
    tower = find_tower(load_vit())
    image = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    features = F.normalize(tower.part("patch_embedding")(image)[0].detach(), dim=0)
    similarity = neighbour_similarity(tower, image)[0]
    for row in range(3):
        for column in range(3):
            around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            cosines = [features[:, row, column] @ features[:, r, c] for r, c in around if 0 <= r < 3 and 0 <= c < 3]
            assert similarity[row, column] == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"block": 99}, "block of the model"), ({"num_neurons": 3}, "even")]
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plant_artifacts(load_vit(), **arguments)
