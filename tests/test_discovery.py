"""Objects under a model: features of every family, images of any size, annotations, CorLoc side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import stacks_cases
import torch
import transformers as tf
from discovery_cases import scene_features
from PIL import Image
from torch import nn

from register_adapter import UnsupportedModelError, add_registers, capture
from register_adapter.evaluation.discovery import (
    BoxedImage,
    LostObject,
    Sweep,
    boxed_scenes,
    corloc,
    discover,
    evaluate_discovery,
    lost,
    read_coco,
    read_voc,
    tokencut,
)
from register_adapter.evaluation.resampling import bootstrap_mean
from register_adapter.features.projections import PROJECTIONS, keep_projection
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit, load_vit
from register_adapter.towers import find_tower
from register_adapter.viz import plot_discovery

#: Families whose maps are the softmax of queries times keys: nothing is turned, normed or added in between.
PLAIN = ("vit", "clip-vision", "dinov2", "siglip-vision", "yolos", "blip-vision", "mgp-str", "flava-vision")
OUTPUTS = ("o_proj", "out_proj", "projection_layer", "projection", "proj")
#: Kinds whose layer behind the sum of the values is not the attention module's own, or which share keys among heads.
NO_LAYER = ("data2vec", "yolos", "flava-vision", "pix2struct-vision", "molmo2-vision")
STACKS = ("timm", "timm-qk-norm", "eva", "eva02", "eva-rope-attention", "open_clip", "open_clip-custom-blocks")


@pytest.fixture(scope="module")
def vit() -> Any:
    return load_vit()


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_image_processor()


@pytest.fixture(scope="module")
def scenes() -> list[BoxedImage]:
    return boxed_scenes(SceneDataset(6, seed=11, split=None))


# Queries, keys and values


def _recorded(model: nn.Module, run: Any, block: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What is recorded of a block, and its attention map."""
    tower = find_tower(model)
    kept = {}
    with torch.no_grad():
        for what in PROJECTIONS:
            with keep_projection(tower, block, what) as values:
                run()
            kept[what] = values[0]
        with capture(model, hidden_states=False) as trace:
            run()
    return kept, trace.attentions[block]


def _by_head(values: torch.Tensor, heads: int) -> torch.Tensor:
    return values.unflatten(-1, (-1, values.shape[-1] // heads)).transpose(1, 2)


@pytest.mark.parametrize("name", [name for name in PLAIN if name in families.CASES])
def test_attention_is_made_of_the_queries_and_keys(name: str) -> None:
    model = families.build(name)
    kept, attention = _recorded(model, lambda: model(**families.make_inputs(name)))
    query, key = (_by_head(kept[what], families.HEADS) for what in ("queries", "keys"))
    made = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(made, attention, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in families.KINDS if name not in NO_LAYER])
def test_what_leaves_the_attention_is_made_of_the_values(name: str) -> None:
    model = families.build(name)
    part = find_tower(model).block_part(0, "attention")
    seen: list[torch.Tensor] = []
    layer = next((getattr(part, output) for output in OUTPUTS if hasattr(part, output)), None)
    if layer is None:  # transformers 4 has the output's layer beside the attention
        layer = find_tower(model).part("blocks")[0].attention.output.dense
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    kept, attention = _recorded(model, lambda: model(**families.make_inputs(name)))
    handle.remove()
    made = (attention @ _by_head(kept["values"], attention.shape[1])).transpose(1, 2).flatten(2)
    given = seen[-1] if len(seen[-1]) == len(made) else seen[-1].transpose(0, 1)  # MLCD has the tokens first
    torch.testing.assert_close(made, given.reshape(made.shape), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", STACKS)
def test_other_libraries(name: str) -> None:
    model = stacks_cases.build_stack(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    tower = find_tower(model)
    kept, attention = _recorded(model, lambda: tower.run(stacks_cases.images()))
    assert {values.shape for values in kept.values()} == {(len(kept["keys"]), attention.shape[-1], families.WIDTH)}
    if name in ("timm", "open_clip", "eva"):
        query, key = (_by_head(kept[what], families.HEADS) for what in ("queries", "keys"))
        made = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        torch.testing.assert_close(made, attention, atol=1e-5, rtol=1e-4)


def test_a_block_without_such_layers_is_refused_by_name() -> None:
    model = stacks_cases.build_stack("timm-parallel")
    with pytest.raises(UnsupportedModelError, match="use tokens"):
        discover(model, torch.zeros(1, 3, 32, 32))
    assert len(discover(model, torch.randn(1, 3, 32, 32), features="tokens")) == 1


# Discovery


@pytest.mark.parametrize("method", ["lost", "tokencut"])
@pytest.mark.parametrize("features", ["keys", "tokens"])
def test_an_object_is_that_of_the_methods_own_function(vit: Any, method: Any, features: Any) -> None:
    pixels = torch.randn(3, 3, 77, 80)
    model = add_registers(load_vit(), num_registers=3)
    objects = discover(model, pixels, method=method, features=features, block=-2, batch_size=2)
    padded = torch.nn.functional.pad(pixels, (0, 0, 0, 3))
    tower = find_tower(model)
    with torch.no_grad(), capture(model, attentions=False) as trace, keep_projection(tower, 6, "keys") as keys:
        model(pixel_values=padded, interpolate_pos_encoding=True)
    wanted = keys[0][:, 1 + 3 :] if features == "keys" else trace.patches(-2)
    function = {"lost": lost, "tokencut": tokencut}[method]
    for image, result in zip(wanted, objects, strict=True):
        own = function(image, grid=(10, 10), patch_size=8, image_size=(77, 80))
        assert (own.seed, own.box) == (result.seed, result.box)
        np.testing.assert_array_equal(own.mask, result.mask)


@pytest.mark.parametrize("name", [name for name in ("mae", "siglip2-vision", "radio") if name in families.CASES])
def test_towers_that_shuffle_take_patches_or_have_no_convolution(name: str) -> None:
    model = families.build(name)
    results = discover(model, torch.randn(2, 3, 32, 32))
    assert [item.mask.shape for item in results] == [(4, 4), (4, 4)]


def test_patches_are_those_of_the_processor() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))
    model = families.build("siglip2-vision")
    processor = tf.Siglip2ImageProcessor(patch_size=8, max_num_patches=24)
    cut = processor(images=image, return_tensors="pt")
    seen: list[torch.Tensor] = []
    tower = find_tower(model)
    tower.module.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    discover(model, image, image_processor=processor)
    torch.testing.assert_close(seen[0]["pixel_values"], cut["pixel_values"])
    assert torch.equal(seen[0]["spatial_shapes"], cut["spatial_shapes"])


def test_images_keep_their_order_whatever_their_sizes(vit: Any, processor: Any) -> None:
    rng = np.random.default_rng(0)
    sizes = [(80, 80), (80, 64), (61, 83), (80, 80), (80, 64), (80, 80)]
    images = [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in sizes]
    together = discover(vit, images, image_processor=processor, batch_size=2)
    alone = [discover(vit, image, image_processor=processor)[0] for image in images]
    assert [item.box for item in together] == [item.box for item in alone]
    assert [item.mask.shape for item in together] == [(-(-h // 8), -(-w // 8)) for h, w in sizes]


def test_pixels_are_those_of_the_processor_padded_with_zeros(vit: Any, processor: Any, scenes: Any) -> None:
    ready = processor(images=scenes[0].image, return_tensors="pt", do_resize=False)["pixel_values"][0]
    for options in ({}, {"size": (80, 80)}, {"size": 80}):
        given = discover(vit, scenes[0].image, image_processor=processor, **options)[0]
        assert given.box == discover(vit, ready)[0].box


def test_boxes_are_in_pixels_of_the_image_as_it_came(vit: Any, processor: Any, scenes: Any) -> None:
    image = scenes[0].image
    small = discover(vit, image, image_processor=processor)[0]
    twice = image.resize((160, 240), Image.Resampling.NEAREST)
    resized = discover(vit, twice, image_processor=processor, size=(80, 80))[0]
    assert resized.patch_size == (24.0, 16.0)
    assert resized.box[2] <= 160
    assert resized.box[3] <= 240
    assert small.patch_size == (8, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "dino"}, "expected one of lost, tokencut"),
        ({"features": "key"}, "expected one of keys"),
        ({"block": 8}, "8 blocks"),
        ({"tau": 0.1}, "lost has no setting tau"),
        ({"batch_size": 0}, "batch_size"),
        ({"images": []}, "no images"),
        ({"images": torch.zeros(1, 1, 8, 8)}, "normalised pixel values"),
        ({"images": {"a": 1}}, "found dict"),
    ],
)
def test_wrong_settings_are_refused(vit: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        discover(vit, options.pop("images", torch.zeros(1, 3, 80, 80)), **options)


def test_a_model_of_one_size_says_what_to_do() -> None:
    model = stacks_cases.build_stack("timm")
    with pytest.raises(ValueError, match="give size="):
        discover(model, torch.randn(1, 3, 40, 32))
    assert discover(model, torch.randn(1, 3, 40, 32), size=(32, 32))[0].patch_size == (10.0, 8.0)


def test_the_model_is_as_it_was(processor: Any, scenes: Any) -> None:
    model = load_vit().train()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    discover(model, scenes[0].image, image_processor=processor)
    with pytest.raises(ValueError, match="NaN"):
        discover(model, torch.full((1, 3, 80, 80), torch.nan))
    assert all(module.training for module in model.modules())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


# CorLoc


def test_corloc_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(0)

    def boxes(count: int) -> Any:
        start = rng.integers(0, 30, (count, 2))
        return np.concatenate([start, start + rng.integers(1, 40, (count, 2))], axis=1)

    def overlap(a: Any, b: Any) -> float:
        shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        return float(shared / (sum(areas) - shared))

    given, truths = boxes(200), [boxes(rng.integers(1, 5)) for _ in range(200)]
    expected = sum(any(overlap(box, true) >= 0.5 for true in t) for box, t in zip(given, truths, strict=True)) / 200
    assert 0 < expected < 1
    assert corloc(given, truths) == expected


def test_half_is_enough_and_no_true_box_is_a_miss() -> None:
    assert corloc([(0, 0, 10, 10)], [[(0, 0, 10, 20)]]) == 1
    assert corloc([(0, 0, 10, 10)], [[(0, 0, 10, 20.1)]]) == 0
    assert corloc([(0, 0, 10, 10)], [[]]) == 0
    with pytest.raises(ValueError, match="1 boxes, and true boxes of 2"):
        corloc([(0, 0, 10, 10)], [[], []])


def test_the_interval_is_that_of_resampled_means() -> None:
    values = np.random.default_rng(1).standard_normal(60)
    rng = np.random.default_rng(2)
    means = np.quantile(rng.choice(values, (20_000, 60)).mean(1), [0.025, 0.975])
    assert bootstrap_mean(values) == pytest.approx(means, abs=0.02)
    assert bootstrap_mean([1, 1, 1]) == (1, 1)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean([])


# Annotations


def _voc(folder: Path) -> Path:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    marked = (("a", 0, 0, (1, 1, 40, 30)), ("a", 1, 0, (5, 6, 7, 8)), ("b", 0, 1, (2, 2, 9, 9)))
    for name in ("a", "b"):
        Image.new("RGB", (64, 48)).save(folder / "JPEGImages" / f"{name}.jpg")
        objects = "".join(
            f"<object><difficult>{difficult}</difficult><truncated>{truncated}</truncated><bndbox>"
            + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
            + "</bndbox></object>"
            for image, difficult, truncated, box in marked
            if image == name
        )
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("a\nb\n")
    return folder


def test_voc(tmp_path: Path) -> None:
    year = _voc(tmp_path / "VOC2007")
    first, second = read_voc(tmp_path)
    assert first.boxes.tolist() == [[0, 0, 40, 30], [4, 5, 7, 8]]
    assert (first.name, first.image) == ("a", year / "JPEGImages" / "a.jpg")
    first, second = read_voc(year, difficult=False, truncated=False)
    assert first.boxes.tolist() == [[0, 0, 40, 30]]
    assert second.boxes.shape == (0, 4)
    with pytest.raises(ValueError, match="there are trainval"):
        read_voc(year, "test")
    (year / "Annotations" / "b.xml").write_text("<annotation><object><bndbox/></object></annotation>")
    with pytest.raises(ValueError, match=r"b\.xml is not an annotation"):
        read_voc(year)
    (year / "ImageSets" / "Main" / "trainval.txt").write_text("../../b\n")
    with pytest.raises(ValueError, match="must hold names"):
        read_voc(year)


def test_coco(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [
            {"image_id": 2, "bbox": [1.4, 2.6, 10, 20], "iscrowd": 0},
            {"image_id": 2, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        ],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    first, second = read_coco(file, tmp_path)
    assert len(first.boxes) == 0
    assert second.boxes.tolist() == [[1, 3, 11, 23]]
    assert len(read_coco(file, tmp_path, crowd=True)[1].boxes) == 2
    content["images"][0]["file_name"] = "../1.jpg"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="outside the folder"):
        read_coco(file, tmp_path)
    file.write_text("[]")
    with pytest.raises(ValueError, match="COCO's kind"):
        read_coco(file, tmp_path)


@pytest.mark.parametrize(
    ("mark", "crowd"), [(0, False), ("0", False), (None, False), (False, False), (1, True), ("1", True), (True, True)]
)
def test_a_crowd_is_one_however_the_file_writes_it(mark: Any, crowd: bool, tmp_path: Path) -> None:
    boxes = [{"image_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": mark}]
    content = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": boxes}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    assert len(read_coco(tmp_path / "instances.json", tmp_path)[0].boxes) == (not crowd)
    assert len(read_coco(tmp_path / "instances.json", tmp_path, crowd=True)[0].boxes) == 1


@pytest.mark.parametrize("mark", ["false", "no", 2, -1, [], 0.5, float("nan")])
def test_a_mark_that_says_neither_is_refused_with_the_file(mark: Any, tmp_path: Path) -> None:
    boxes = [{"image_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": mark}]
    content = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": boxes}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances\.json.*iscrowd must be 0 or 1, found"):
        read_coco(tmp_path / "instances.json", tmp_path)
    year = _voc(tmp_path / "VOC2007")
    path = year / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<difficult>1<", f"<difficult>{mark}<"))
    with pytest.raises(ValueError, match=r"a\.xml.*difficult must be 0 or 1, found"):
        read_voc(year, difficult=False)
    assert len(read_voc(year)[0].boxes) == 2  # nothing is asked of the mark


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', r"b\.xml is not an annotation.*unknown encoding"),
        ("a\nb\0c\n", r"trainval\.txt must hold names"),
    ],
)
def test_what_no_devkit_of_voc_holds_is_refused_with_the_file(content: str, said: str, tmp_path: Path) -> None:
    year = _voc(tmp_path / "VOC2007")
    (year / ("Annotations/b.xml" if "<" in content else "ImageSets/Main/trainval.txt")).write_text(content)
    with pytest.raises(ValueError, match=said):
        read_voc(year)


@pytest.mark.parametrize(
    ("image", "said"),
    [({"id": 1, "file_name": "2.jpg"}, "several images with the id 1"), ({"id": 2, "file_name": "a\0b"}, "no name")],
)
def test_what_no_file_of_coco_holds_is_refused_with_the_file(image: dict[str, Any], said: str, tmp_path: Path) -> None:
    content = {"images": [{"id": 1, "file_name": "1.jpg"}, image], "annotations": []}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"instances\.json.*{said}"):
        read_coco(tmp_path / "instances.json", tmp_path)


# Evaluation


@pytest.fixture(scope="module")
def report(processor: Any) -> Any:
    models = {"planted": load_planted_vit().model, "clean": load_vit()}
    images = SceneDataset(20, seed=7, split=None)
    sweep = Sweep(("keys", "values"), 2, {"lost": [{"normalize": True, "bias": -0.2}], "tokencut": [{"tau": 0.4}]})
    return evaluate_discovery(models, images, sweep=sweep, image_processor=processor, held_out_share=0.3)


@pytest.mark.slow
def test_every_model_has_two_rows_a_method_of_the_same_images(report: Any) -> None:
    assert [(row.plan.method, row.model, row.swept) for row in report.rows] == [
        (method, model, swept)
        for method in ("lost", "tokencut")
        for model in ("planted", "clean")
        for swept in (False, True)
    ]
    assert (len(report.names), len(report.held_out), report.skipped) == (14, 6, 0)
    assert not set(report.names) & set(report.held_out)
    for row in report.rows:
        assert len(row.right) == len(row.boxes) == 14
        assert row.corloc.value == np.mean(row.right)
        assert row.corloc.low <= row.corloc.value <= row.corloc.high
        assert (row.difference is None) == (row.model == "planted")
        if not row.swept:
            assert row.plan.to_dict() | {"features": "keys", "block": -1} == row.plan.to_dict()


@pytest.mark.slow
def test_the_choice_is_the_best_on_held_out_images(report: Any) -> None:
    for row in report.rows:
        scores = dict(enumerate(value for _, value in row.held_out))
        assert len(scores) == (5 if row.swept else 0)
        if row.swept:
            assert row.plan == row.held_out[max(scores, key=lambda place: (scores[place], -place))][0]


def test_differences_are_paired_with_the_base(report: Any) -> None:
    rows = {(row.plan.method, row.model, row.swept): row for row in report.rows}
    for (method, model, swept), row in rows.items():
        if model == "clean":
            base = rows[method, "planted", swept]
            assert row.difference.value == pytest.approx(np.mean(np.array(row.right, float) - base.right))


def test_a_report_is_json_and_a_table(report: Any) -> None:
    content = json.loads(json.dumps(report.to_dict()))
    assert content["rows"][1]["chosen"]["block"] == report.rows[1].plan.block
    assert {"k_patches", "bias", "normalize", "features", "block"} == set(content["rows"][0]["chosen"])
    assert str(report).count("\n| lost |") == 4


def test_an_adapter_and_its_base(processor: Any, scenes: list[BoxedImage]) -> None:
    model = add_registers(load_vit(), num_registers=2)
    pairs = [(item.image, item.boxes) for item in scenes]
    measured = evaluate_discovery(model, pairs, sweep=None, image_processor=processor, methods=["lost"])
    assert [row.model for row in measured.rows] == ["base", "+ default"]
    plain = [item.box for item in discover(load_vit(), [item.image for item in scenes], image_processor=processor)]
    assert [tuple(map(float, box)) for box in plain] == list(measured.rows[0].boxes)
    assert measured.rows[1].difference is not None


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([80, 0, 90, 20], "1 of 4 images have a true box that lies outside"),
        ([4, -9, 20, -1], "1 of 4 images have a true box that lies outside"),
        ([70, -5, 95, 200], ""),
    ],
    ids=["beyond", "before", "over the edge"],
)
def test_true_boxes_of_another_size_of_image_are_told(
    box: list[float], said: str, vit: Any, processor: Any, scenes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [(scenes[0].image, [box]), *((item.image, item.boxes) for item in scenes[1:4])]
    evaluate_discovery(vit, pairs, sweep=None, image_processor=processor, methods=["lost"])
    told = [record.message for record in caplog.records if "another size" in record.message]
    assert [said in text for text in told] == [True] * bool(said)


def test_what_cannot_be_measured_is_refused(vit: Any, processor: Any, scenes: list[BoxedImage], tmp_path: Path) -> None:
    scenes[0].image.save(tmp_path / "a.png")
    leaked = [(tmp_path / "a.png", scenes[0].boxes)]
    for images, options, said in (
        (leaked, {"held_out": [(str(tmp_path / "a.png"), scenes[0].boxes)]}, "measured and held out"),
        (leaked, {}, "held_out_share"),
        ([(scenes[0].image, [])], {}, "none of 1 images"),
        (scenes, {"methods": []}, "methods is empty"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate_discovery(vit, images, image_processor=processor, **options)


# The figure


@pytest.mark.parametrize("method", ["lost", "tokencut"])
def test_boxes_are_drawn_where_they_are(vit: Any, processor: Any, scenes: Any, method: Any, tmp_path: Path) -> None:
    item = scenes[0]
    (result,) = discover(vit, item.image, image_processor=processor, method=method)
    figure = plot_discovery(item.image, result, item.boxes, path=tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    drawn = [
        (min(line.get_xdata()), min(line.get_ydata()), max(line.get_xdata()), max(line.get_ydata()))
        for line in figure.axes[0].lines
    ]
    assert drawn == [*map(tuple, item.boxes), tuple(map(float, result.box))]
    assert ("degree" in figure.axes[2].get_title()) == isinstance(result, LostObject)


# The benchmark


@pytest.mark.slow
def test_the_benchmark_writes_what_it_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import evaluation

    grid = (10, 10)
    features = torch.from_numpy(scene_features(0)).float()
    box = tuple(8 * side for side in evaluation.published_lost(features, grid))
    assert box == lost(features, grid=grid, patch_size=8).box
    box = tuple(8 * side for side in evaluation.published_tokencut(features, grid))
    assert box == tokencut(features, grid=grid, patch_size=8).box
    few = ["--model", "tiny", "--size", "112", "--repeats", "2", "--slow_repeats", "2"]
    report = evaluation.main([*few, "--out", str(tmp_path / "evaluation.json")])
    assert {"benchmark", "config", "versions", "hardware", "commit", "results", "targets"} <= set(report)
    ratios = [name for result in report["results"] for name in result["ratios"]]
    methods = ["lost/lost, published", "tokencut/tokencut, published"]
    assert ratios == ["features/forward", "get_features/forward", *methods]
    assert [target["target"] for target in report["targets"]][-1] == "ms of lost"
