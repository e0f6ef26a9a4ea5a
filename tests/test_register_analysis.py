"""Register analysis: known answers, what ``capture`` shows, the same by hand, and the refusals."""

from __future__ import annotations

import json
from typing import Any

import families
import numpy as np
import pytest
import torch
from helpers import Snapshot, assert_identical, hooks, run
from torch.nn import functional as F

from register_adapter import RegisterConfig, UnsupportedModelError, add_registers, capture, find_register_layer
from register_adapter.evaluation import analyse_registers
from register_adapter.evaluation.registers.states import find_registers, without_adapters
from register_adapter.testbed import SceneDataset, load_image_processor, load_vit

# Models with registers of their own (and how many), and models that get some.
_NATIVE = {"dinov2-registers": 3, "dinov3": 3, "tipsv2": 3}
_ADAPTED = ("vit", "deit", "clip-vision", "dinov2", "siglip-vision", "beit", *_NATIVE)
CASES = [(name, "native") for name in _NATIVE] + [(name, "adapter") for name in _ADAPTED]
CASES = [(name, kind) for name, kind in CASES if name in families.CASES]

STACKS = [
    ("timm-registers", "native"),
    ("timm-registers", "adapter"),
    ("timm-registers-only", "native"),
    ("dinov3-timm", "native"),
    ("dinov3-timm", "adapter"),
    ("hub-registers", "native"),
    ("open_clip", "adapter"),
    ("torchvision", "adapter"),
]


def _model(name: str, kind: str, attention: str = "sdpa", std: float = 1.0, **options: Any) -> Any:
    model = families.build(name, attention)
    return add_registers(model, 4, init_std=std, **options).eval() if kind == "adapter" else model


def _pixels(count: int = 8, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _place(model: Any, kind: str) -> slice:
    """Where the registers stand, counted by hand."""
    layer = find_register_layer(model)
    registers = find_registers(model, kind)
    if kind == "adapter":
        return slice(layer.prefix, layer.prefix + layer.num_active)
    return slice(registers.tower.prefix - registers.count, registers.tower.prefix)


def _check(report: Any, model: Any, kind: str, means: torch.Tensor, pixels: torch.Tensor) -> None:
    """Maps, similarities and shares are what ``capture`` shows, whose tokens are counted by hand."""
    place, count = _place(model, kind), len(report.names)
    with torch.no_grad(), capture(model) as trace:
        find_registers(model, kind).tower.run(pixels)
    first = trace.prefix + trace.num_registers
    rows = trace.attentions[-1][:, :, place]
    expected = rows[..., first:].unflatten(3, (4, 4))
    assert report.attention.dtype == np.float32
    np.testing.assert_allclose(report.attention, expected.numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(report.mean_attention, expected.mean(1).numpy(), rtol=1e-5, atol=1e-7)
    for block, maps in enumerate(trace.attentions):
        mean = F.normalize(maps.mean(1)[:, place, first:], dim=-1)
        np.testing.assert_allclose(report.map_similarity[block], (mean @ mean.transpose(1, 2)).mean(0), atol=1e-5)
        share = maps.mean(1)[:, place, first:].sum(-1).mean(0)
        np.testing.assert_allclose(report.attention_shares[block, :, 0], share, atol=1e-5)
    np.testing.assert_allclose(report.attention_shares.sum(-1), 1, atol=1e-5)
    outputs = F.normalize(trace.hidden_states[-1][:, place], dim=-1)
    np.testing.assert_allclose(report.output_similarity, (outputs @ outputs.transpose(1, 2)).mean(0), atol=1e-5)
    assert report.map_similarity.shape == (len(trace.attentions), count, count)

    with torch.no_grad(), capture(model, attentions=False) as trace:
        find_registers(model, kind).tower.run(means)
    states = trace.hidden_states[-1][:, place].double()
    constancy = states.mean(0).square().sum(-1) / states.square().sum(-1).mean(0)
    np.testing.assert_allclose(report.constancy[-1], constancy, atol=1e-5)
    assert np.all(report.constancy <= 1 + 1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_transformers(name: str, kind: str, attention: str) -> None:
    model = _model(name, kind, attention)
    inputs = families.make_inputs(name)
    snapshot = Snapshot(model, inputs)
    tower = find_registers(model, kind).tower
    before = tower.config._attn_implementation
    pixels = _pixels()
    report = analyse_registers(model, [pixels[:4], pixels[4:]], kind=kind)
    snapshot.check()
    assert tower.config._attn_implementation == before
    assert (report.kind, report.num_images, report.num_mean_images) == (kind, 4, 4)
    _check(report, model, kind, pixels[4:], pixels[:4])
    assert [ablation.kind for ablation in report.ablations] == ["mean", "shuffle"]
    for ablation in report.ablations:  # random registers of size one are read by other tokens
        assert ablation.change.patches.value > 1e-7
        assert ablation.change.patches.num_images == 4
    assert (report.drift is None) == (kind == "native")


@pytest.mark.parametrize(("name", "kind"), STACKS)
def test_other_libraries(name: str, kind: str) -> None:
    stacks = pytest.importorskip("stacks_cases")
    model = stacks.build_stack(name)
    if kind == "adapter":
        model = add_registers(model, 4, init_std=1.0).eval()
    snapshot = stacks.PlainSnapshot(model, {"x": _pixels(2)})
    pixels = _pixels()
    report = analyse_registers(model, [pixels[:4], pixels[4:]], kind=kind)
    snapshot.check()
    assert report.kind == kind
    _check(report, model, kind, pixels[4:], pixels[:4])
    assert (report.ablations[0].change.cls is None) == (name == "timm-registers-only")
    assert all(ablation.change.patches.value > 1e-7 for ablation in report.ablations)


# Known answers


@pytest.mark.parametrize(("name", "kind"), [("vit", "adapter"), ("dinov2-registers", "native"), ("dinov3", "adapter")])
def test_registers_that_are_the_same_in_all_images_can_be_replaced_without_a_trace(name: str, kind: str) -> None:
    model = _model(name, kind)
    same = _pixels(1).expand(4, -1, -1, -1)
    report = analyse_registers(model, [same, same], each=True, kind=kind)
    assert len(report.ablations) == 2 * (len(report.names) + 1)
    for ablation in report.ablations:
        assert abs(ablation.change.patches.value) <= 1e-6
        assert ablation.change.patches_relative.value <= 1e-6
        assert ablation.change.cls_relative.value <= 1e-6
    np.testing.assert_allclose(report.constancy, 1, atol=1e-6)
    # At the input of the first block they are the same in any images.
    report = analyse_registers(model, list(_pixels().split(4)), ablate_blocks=[0], kind=kind)
    assert all(ablation.change.patches_relative.value <= 1e-6 for ablation in report.ablations)
    assert all(ablation.blocks == (0,) for ablation in report.ablations)
    report = analyse_registers(model, list(_pixels().split(4)), ablate_blocks=[-1], kind=kind)
    assert all(ablation.change.patches_relative.value > 1e-5 for ablation in report.ablations)


@pytest.mark.parametrize(("name", "kind"), [("vit", "adapter"), ("dinov2-registers", "native")])
def test_an_ablation_is_what_the_last_block_makes_of_other_registers(name: str, kind: str) -> None:
    """By hand: the last block is called with states from ``capture`` in which registers are replaced."""
    model, pixels = _model(name, kind), _pixels()
    report = analyse_registers(model, [pixels[:4], pixels[4:]], ablate_blocks=[-1], kind=kind)
    place, tower = _place(model, kind), find_registers(model, kind).tower
    states = []
    for part in (pixels[:4], pixels[4:]):
        with torch.no_grad(), capture(model, attentions=False) as trace:
            tower.run(part)
        states.append(trace.hidden_states)
    hidden, clean = states[0][-2].clone(), states[0][-1]
    hidden[:, place] = states[1][-2][:, place].mean(0)
    with torch.no_grad():
        ablated = tower.part("blocks")[-1](hidden)
    ablated = ablated[0] if isinstance(ablated, tuple) else ablated
    start = trace.prefix + trace.num_registers
    moved = 1 - F.cosine_similarity(ablated[:, start:].double(), clean[:, start:].double(), dim=-1)
    change = report.ablations[0].change
    assert change.patches.value == pytest.approx(moved.mean().item(), rel=1e-4)
    cls = 1 - F.cosine_similarity(ablated[:, 0].double(), clean[:, 0].double(), dim=-1)
    assert change.cls.value == pytest.approx(cls.mean().item(), rel=1e-4)
    assert change.cls.standard_error == pytest.approx(cls.std().item() / 2, rel=1e-4)


def test_a_shuffle_takes_the_registers_of_another_image() -> None:
    """With two images a shuffle is an exchange: the last block sees each image with the other's registers."""
    model, pixels = _model("vit", "adapter"), _pixels(4)
    report = analyse_registers(model, [pixels[:2], pixels[2:]], ablate_blocks=[-1])
    tower = find_registers(model).tower
    with torch.no_grad(), capture(model, attentions=False) as trace:
        tower.run(pixels[:2])
    hidden = trace.hidden_states[-2].clone()
    hidden[:, 1:5] = trace.hidden_states[-2][:, 1:5].flip(0)
    with torch.no_grad():
        shuffled = tower.part("blocks")[-1](hidden)
    shuffled = shuffled[0] if isinstance(shuffled, tuple) else shuffled
    clean = trace.hidden_states[-1]
    relative = (shuffled - clean)[:, 5:].norm(dim=-1) / clean[:, 5:].norm(dim=-1)
    assert report.ablations[1].change.patches_relative.value == pytest.approx(relative.mean().item(), rel=1e-4)


def test_drift_is_the_distance_to_the_model_without_adapters() -> None:
    model, pixels = _model("vit", "adapter"), _pixels()
    report = analyse_registers(model, [pixels[:4], pixels[4:]])
    with torch.no_grad(), capture(model, attentions=False) as trace:
        model(pixels[:4])
        adapted = trace.hidden_states[-1][:, 0].double()
        with model.disable_adapter():
            model(pixels[:4])
    base = trace.hidden_states[-1][:, 0].double()
    assert report.drift.cls.value == pytest.approx((1 - F.cosine_similarity(adapted, base, dim=-1)).mean().item())
    relative = ((adapted - base).norm(dim=-1) / base.norm(dim=-1)).mean().item()
    assert report.drift.cls_relative.value == pytest.approx(relative)
    assert report.drift.patches.value > 1e-5


def test_registers_that_nobody_sees_have_no_drift_and_no_effect() -> None:
    model = _model("vit", "adapter", gate=-1e4)
    report = analyse_registers(model, list(_pixels().split(4)))
    assert report.drift.patches_relative.value <= 1e-6
    assert report.drift.cls_relative.value <= 1e-6
    assert all(ablation.change.patches_relative.value <= 1e-6 for ablation in report.ablations)


def test_without_adapters_is_the_base_bit_for_bit_and_leaves_every_flag() -> None:
    base = families.build("vit")
    inputs = families.make_inputs("vit")
    expected = run(base, inputs)
    model = add_registers(families.build("vit"), 4).eval()
    model.add_adapter("other", RegisterConfig(num_registers=2))
    for parameter in find_register_layer(model).parameters():
        parameter.requires_grad_(False)
    layer, before = find_register_layer(model), [p.requires_grad for p in model.parameters()]
    with without_adapters(model):
        assert_identical(run(model, inputs), expected)
    assert not layer.disable_adapters
    assert [p.requires_grad for p in model.parameters()] == before
    with model.disable_adapter():
        with without_adapters(model):
            pass
        assert layer.disable_adapters


@pytest.mark.slow
def test_accuracy_with_other_registers() -> None:
    """The shipped ViT with registers that spoil it: large and random."""
    model = add_registers(load_vit(), 4, init_std=2.0).eval()
    scenes, processor = list(SceneDataset(48, seed=31, split=None)), load_image_processor()
    pixels = processor([item["image"] for item in scenes], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([item["label"] for item in scenes])
    batches = [{"pixel_values": pixels[part], "labels": labels[part]} for part in (slice(24), slice(24, None))]
    report = analyse_registers(model, batches)
    with torch.no_grad():
        hits = model(pixel_values=pixels[:24]).logits.argmax(-1) == labels[:24]
    assert report.accuracy.value == pytest.approx(hits.float().mean().item())
    assert report.notes == []
    for ablation in report.ablations:
        assert ablation.accuracy_change.value == pytest.approx(ablation.accuracy.value - report.accuracy.value)
        assert ablation.accuracy.num_images == 24
    assert report.grid == (10, 10)
    again = analyse_registers(model, batches)
    assert again.to_dict() == report.to_dict()
    # Labels apart, and another seed: another exchange, the same means.
    other = analyse_registers(model, pixels.split(24), labels.tolist(), seed=1)
    assert other.ablations[0] == report.ablations[0]
    assert other.ablations[1].change != report.ablations[1].change


def test_the_report_is_json_and_says_why_nothing_is_zeroed() -> None:
    model = _model("vit-classifier", "adapter")
    report = analyse_registers(model, list(_pixels().split(4)), [0] * 8, each=True)
    parsed = json.loads(json.dumps(report.to_dict()))
    assert np.array(parsed["attention"]).shape == (4, families.HEADS, 4, 4, 4)
    assert "2402.17762" in parsed["why_not_zero"]
    text = report.to_markdown()
    assert "2604.14433" in text
    assert text.count("| mean ablation |") == text.count("| shuffle ablation |") == 5
    assert "| drift to the base | all |" in text
    assert report.accuracy is not None
    assert not any(ablation.kind == "zero" for ablation in report.ablations)


# Where images come from


def test_means_are_of_other_images() -> None:
    model, pixels = _model("vit", "adapter"), _pixels()
    alone = analyse_registers(model, [pixels[:4]], mean_images=[pixels[4:]])
    by_turns = analyse_registers(model, [pixels[:4], pixels[4:]])
    halved = analyse_registers(model, [pixels])
    assert alone.ablations == by_turns.ablations == halved.ablations
    assert alone.num_images == alone.num_mean_images == 4
    changed = analyse_registers(model, [pixels[:4]], mean_images=[_pixels(4, seed=9)])
    assert changed.ablations[0] != alone.ablations[0]
    assert changed.ablations[1] == alone.ablations[1]
    few = analyse_registers(model, pixels.split(2), max_images=4, num_maps=1)
    assert (few.num_images, few.num_mean_images, few.attention.shape[0]) == (2, 2, 1)


def test_a_last_batch_of_one_image_is_left_out_of_the_exchange() -> None:
    model, pixels = _model("vit", "adapter"), _pixels(5)
    report = analyse_registers(model, [pixels[:4], pixels[4:]], mean_images=[_pixels(4, seed=9)])
    assert [ablation.change.patches.num_images for ablation in report.ablations] == [5, 4]
    with pytest.raises(ValueError, match="batches of two images"):
        analyse_registers(model, pixels.split(1))


# Adapters of other kinds


def test_deep_registers_have_maps_and_no_ablation() -> None:
    report = analyse_registers(_model("vit", "adapter", deep=True), list(_pixels().split(4)))
    assert report.ablations == []
    assert "deep=True" in report.notes[0]
    assert report.notes[0] in report.to_markdown()
    assert np.isfinite(report.attention).all()
    np.testing.assert_allclose(report.constancy[:-1], 1, atol=1e-6)
    assert report.drift.patches.value > 0


def test_registers_that_start_later_are_missing_before() -> None:
    model = _model("vit", "adapter", insert_layer=1)
    report = analyse_registers(model, list(_pixels().split(4)))
    assert np.isnan(report.map_similarity[0]).all()
    assert np.isnan(report.attention_shares[0]).all()
    assert np.isfinite(report.map_similarity[1]).all()
    assert np.isnan(report.constancy[0]).all()
    assert report.ablations[0].blocks == (1,)
    assert json.loads(json.dumps(report.to_dict()))["map_similarity"][0][0][0] is None
    with pytest.raises(ValueError, match=r"block 0 does not have all 4 registers; blocks \[1\] do"):
        analyse_registers(model, list(_pixels().split(4)), block=0)
    with pytest.raises(ValueError, match=r"blocks \[0\] have no registers to replace"):
        analyse_registers(model, list(_pixels().split(4)), ablate_blocks=[0, 1])


def test_several_adapters_at_once() -> None:
    model = _model("vit", "adapter")
    model.add_adapter("deep", RegisterConfig(num_registers=2, insert_layer=1, deep=True, init_std=1.0))
    model.base_model.set_adapter(["default", "deep"])
    report = analyse_registers(model, list(_pixels().split(4)), each=True)
    assert len(report.names) == 6
    assert np.isnan(report.map_similarity[0, 4:]).all()
    assert np.isfinite(report.map_similarity[0, :4, :4]).all()
    assert "register 4, register 5" in report.notes[0]
    assert [ablation.registers for ablation in report.ablations[::2]] == [(0, 1, 2, 3, 4, 5), (0,), (1,), (2,), (3,)]


def test_what_has_no_registers_is_refused_by_name() -> None:
    images = list(_pixels().split(4))
    with pytest.raises(UnsupportedModelError, match="key_value=True"):
        analyse_registers(_model("vit", "adapter", key_value=True), images)
    with pytest.raises(UnsupportedModelError, match="ViTModel has no registers"):
        analyse_registers(families.build("vit"), images)
    with pytest.raises(UnsupportedModelError, match="no native registers"):
        analyse_registers(_model("vit", "adapter"), images, kind="native")
    with pytest.raises(ValueError, match="kind must be"):
        analyse_registers(_model("vit", "adapter"), images, kind="both")  # type: ignore[arg-type]
    model = _model("vit", "adapter")
    with model.disable_adapter(), pytest.raises(UnsupportedModelError, match="enable the adapter"):
        analyse_registers(model, images)
    with pytest.raises(ValueError, match="at least two"):
        analyse_registers(model, [_pixels(1)])
    with pytest.raises(ValueError, match=r"blocks \[9\] of a tower with 2"):
        analyse_registers(model, images, block=9)
    native = add_registers(families.build("dinov2-registers"), 2, key_value=True).eval()
    assert analyse_registers(native, images, kind="native").names[0] == "native register 0"


def test_a_model_that_hides_its_places_or_has_no_logits_says_so() -> None:
    inputs = [families.make_inputs("siglip2-vision", batch=4) for _ in range(2)]
    report = analyse_registers(_model("siglip2-vision", "adapter"), inputs)
    assert report.grid is None
    assert report.attention.shape == (4, families.HEADS, 4, 1, families.PATCHES)
    report = analyse_registers(_model("vit", "adapter"), list(_pixels().split(4)), [0] * 8)
    assert report.accuracy is None
    assert "no logits" in report.notes[0]


@pytest.mark.parametrize("passes", range(0, 12, 2))
def test_the_model_is_as_before_after_an_exception_in_any_pass(passes: int) -> None:
    model = _model("vit", "adapter").train()
    installed, layer = hooks(model), find_register_layer(model)
    tower, calls = layer.tower.module, []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > passes:
            raise RuntimeError("mine")

    handle = tower.layernorm.register_forward_hook(fail)
    if passes < 6:
        with pytest.raises(RuntimeError, match="mine"):
            analyse_registers(model, list(_pixels().split(4)))
    else:
        analyse_registers(model, list(_pixels().split(4)))
    handle.remove()
    assert hooks(model) == installed
    assert model.training
    assert layer.training
    assert not layer.disable_adapters
    assert tower.config._attn_implementation == "sdpa"
