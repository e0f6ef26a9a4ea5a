"""Segmentation and depth on patch tokens: figures as scikit-learn has them, layouts, scenes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from execution_cases import registered
from PIL import Image
from sklearn.metrics import jaccard_score, mean_squared_error
from torch.nn import functional as F

from register_adapter import add_registers, capture
from register_adapter.evaluation import evaluate_depth, evaluate_segmentation
from register_adapter.evaluation.downstream import distance_scenes, mask_scenes, read_depths, read_masks
from register_adapter.evaluation.downstream.dense import DenseReader, cells_of_pixels, enlarge
from register_adapter.evaluation.downstream.dense_images import DenseImage
from register_adapter.evaluation.downstream.depth import _means, root_mean_squared_error
from register_adapter.evaluation.downstream.reading import Reading
from register_adapter.evaluation.downstream.segmentation import _commonest, class_counts, mean_iou
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit, load_vit

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
QUICK: dict[str, Any] = {"inverse_penalties": (1e-2,), "max_iter": 15, "tokens_per_image": 20}


@pytest.fixture(scope="module")
def model() -> Any:
    return load_planted_vit().model


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_image_processor()


@pytest.fixture(scope="module")
def sets() -> tuple[list[Any], list[Any]]:
    """Shapes of any kind as one class."""
    both = []
    for count, seed in ((16, 1), (6, 2)):
        items = mask_scenes(SceneDataset(count, seed=seed, split=None))
        both.append([(item.image, (item.read() > 0).astype(np.int64)) for item in items])
    return both[0], both[1]


# Figures


def test_mean_iou_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    masks, guesses = rng.integers(-1, 5, (2, 4, 20, 30))
    guesses = guesses.clip(0)
    masks[masks == 3] = 0  # a class that is only predicted counts, with 0
    counts = [class_counts(guess, mask) for guess, mask in zip(guesses, masks, strict=True)]
    valid = masks >= 0
    reference = jaccard_score(masks[valid], guesses[valid], average="macro", zero_division=0)
    assert mean_iou(np.sum(counts, 0)[None])[0] == pytest.approx(reference, abs=1e-12)
    assert mean_iou(np.zeros((2, 5, 3))).tolist() == [0, 0]


def test_rmse_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    guess, depths = rng.uniform(0, 9, (2, 20, 30)).astype(np.float32)
    depths[:5] = np.nan
    assert root_mean_squared_error(guess, depths) == pytest.approx(
        mean_squared_error(depths[5:].astype(float), guess[5:].astype(float)) ** 0.5, rel=1e-9
    )


@pytest.mark.parametrize("size", [(33, 47), (5, 4), (4, 90)])
def test_maps_are_enlarged_as_torch_does_in_bands(size: tuple[int, int]) -> None:
    maps = torch.randn(3, 5, 4)
    bands = list(enlarge(maps, size, most=3 * size[1] * 2))
    assert len(bands) == -(-size[0] // 2)
    reference = F.interpolate(maps[None], size, mode="bilinear")[0]
    torch.testing.assert_close(torch.cat([band for _, band in bands], 1), reference, atol=1e-5, rtol=1e-5)


def test_targets_of_patches() -> None:
    mask = np.zeros((4, 6), np.int64)
    mask[:2, 2:4] = [[2, 2], [2, 0]]
    mask[2:, :3] = -1
    classes, valid = _commonest(mask, (2, 3))
    assert classes[valid].tolist() == [0, 2, 0, 0, 0]
    assert valid.tolist() == [True, True, True, False, True, True]
    depths, known = _means(np.where(mask < 0, np.nan, mask), (2, 3))
    assert depths[known].tolist() == [0, 1.5, 0, 0, 0]
    assert known.tolist() == valid.tolist()
    assert np.bincount(cells_of_pixels(np.zeros((480, 640)), (14, 14)), minlength=196).min() > 0


# Models


def test_segmentation_of_scenes_side_by_side(model: Any, processor: Any, sets: Any) -> None:
    report = evaluate_segmentation(
        {"planted": model, "clean": load_vit()}, *sets, classes=("none", "shape"), image_processor=processor, **QUICK
    )
    planted, clean = report.rows
    assert clean.score.value > planted.score.value > 0.5
    assert clean.difference is not None
    assert clean.difference.value == pytest.approx(clean.score.value - planted.score.value)
    assert clean.difference.low <= clean.difference.value <= clean.difference.high
    assert set(clean.chosen["per_class"]) == {"none", "shape"}
    assert np.mean(list(clean.chosen["per_class"].values())) == pytest.approx(clean.score.value)
    assert clean.chosen["patches"] == 16 * 20
    assert len(clean.values) == 6
    json.dumps(report.to_dict(), allow_nan=False)


def test_masks_at_another_size_and_patch_multiples(model: Any, processor: Any, sets: Any) -> None:
    larger = [
        (image.resize((100, 90)), np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((100, 90), 0), np.int64))
        for image, mask in sets[1]
    ]
    report = evaluate_segmentation(model, sets[0], larger, size=90, image_processor=processor, **QUICK)
    assert report.rows[0].chosen["size"] == [96, 96]
    assert report.rows[0].score.value > 0.4


@pytest.mark.parametrize("head", ["bins", "ridge"])
@pytest.mark.slow
def test_depth_of_scenes(model: Any, processor: Any, head: Any) -> None:
    train, test = SceneDataset(12, seed=1, split=None), SceneDataset(5, seed=2, split=None)
    report = evaluate_depth(model, train, test, head=head, bins=16, image_processor=processor, tokens_per_image=40)
    truths = [item.read() for item in distance_scenes(test)]
    mean = np.mean([item.read().mean() for item in distance_scenes(train)])
    constant = np.mean([root_mean_squared_error(np.full_like(depths, mean), depths) for depths in truths])
    assert report.rows[0].score.value < 0.9 * constant
    assert report.rows[0].setting == f"{head}, last block"
    assert "↓" in report.metric.heading
    json.dumps(report.to_dict(), allow_nan=False)
    quick: Any = {"penalties": (0.5,), "max_iter": 2, "tokens_per_image": 4}
    chosen = evaluate_depth(model, train, test, head=head, image_processor=processor, **quick).rows[0].chosen
    assert chosen[{"bins": "weight_decay", "ridge": "alpha"}[head]] == 0.5


def test_patch_tokens_of_a_store_are_those_of_the_model(model: Any, processor: Any, sets: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"image_processor": processor, **QUICK}
    plain = evaluate_segmentation(model, sets[0][:6], sets[1][:2], **arguments)
    for _ in range(2):
        stored = evaluate_segmentation(model, sets[0][:6], sets[1][:2], store=tmp_path, **arguments)
        assert stored.rows[0].values == plain.rows[0].values
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("way", ["default", "key_value"])
def test_patch_tokens_of_rows_of_patches_are_those_of_the_model(way: str) -> None:
    """SigLIP 2's kind takes no images: its patches are cut of the resized image."""
    model = registered("siglip2-vision", way)
    images = [Image.fromarray(np.full((h, w, 3), 40 * h % 255, np.uint8)) for h, w in ((30, 20), (5, 7))]
    processor = families.tf.Siglip2ImageProcessor(patch_size=8, do_normalize=False)
    reader = DenseReader((model, "default"), Reading(image_processor=processor), (16, 24))
    items = [DenseImage(image, np.zeros(image.size[::-1]), "") for image in images]
    for (_, tokens, _), image in zip(reader.maps(items, ""), images, strict=True):
        pixels = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC), np.float32) / 255
        rows = pixels.reshape(2, 8, 3, 8, 3).transpose(0, 2, 1, 3, 4).reshape(1, 6, -1)
        mask, shape = torch.ones(1, 6, dtype=torch.long), torch.tensor([[2, 3]])
        with torch.no_grad():
            expected = model(torch.from_numpy(rows), pixel_attention_mask=mask, spatial_shapes=shape)
        assert torch.allclose(tokens, expected.last_hidden_state[0], atol=1e-5)


@pytest.mark.parametrize("name", ["timm", "open_clip"])
def test_a_size_that_the_model_does_not_take_is_refused(name: str) -> None:
    from stacks_cases import build_stack  # skips without these libraries

    images = [Image.fromarray(np.full((32, 32, 3), value, np.uint8)) for value in (1, 2)]
    pairs = [(image, np.arange(1024).reshape(32, 32) % 2) for image in images]
    options: dict[str, Any] = {"image_processor": load_image_processor(), "size": (32, 48)}
    with pytest.raises(ValueError, match=r"fails on images of 32 × 48 px: .*takes images of one size only: give size="):
        evaluate_segmentation(build_stack(name), pairs[:1], pairs[1:], **options, **QUICK)


def test_a_test_image_that_is_a_training_image_is_refused(model: Any, processor: Any, sets: Any) -> None:
    with pytest.raises(ValueError, match="1 of 1 test images are training images too"):
        evaluate_segmentation(model, sets[0], sets[0][3:4], image_processor=processor)
    scenes = SceneDataset(2, seed=1, split=None)
    with pytest.raises(ValueError, match="2 of 2 test images are training images too"):
        evaluate_depth(model, scenes, scenes, image_processor=processor)
    with pytest.raises(ValueError, match="head='tree'"):
        evaluate_depth(model, scenes, scenes, head="tree")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="penalties must be numbers above 0"):
        evaluate_depth(model, scenes, scenes, penalties=())


def test_test_images_without_any_class_are_refused(model: Any, processor: Any, sets: Any) -> None:
    bare = [(image, np.full_like(mask, -1)) for image, mask in sets[1][:2]]
    with pytest.raises(ValueError, match="no pixel of the 2 test images has a class"):
        evaluate_segmentation(model, sets[0][:6], bare, image_processor=processor, **QUICK)
    half = evaluate_segmentation(model, sets[0][:6], [bare[0], sets[1][1]], image_processor=processor, **QUICK)
    alone = evaluate_segmentation(model, sets[0][:6], [sets[1][1]], image_processor=processor, **QUICK)
    assert half.rows[0].score.value == alone.rows[0].score.value > 0


@pytest.mark.parametrize("mark", [-2, -100])
def test_whatever_is_below_zero_is_no_class(mark: int, model: Any, processor: Any, sets: Any) -> None:
    def marked(items: Any, with_mark: int) -> Any:
        return [(image, np.where(np.arange(len(mask))[:, None] < 30, mask, with_mark)) for image, mask in items]

    quick = {**QUICK, "tokens_per_image": 100}
    usual, other = (
        evaluate_segmentation(
            model, marked(sets[0][:6], value), marked(sets[1][:3], value), image_processor=processor, **quick
        ).rows[0]
        for value in (-1, mark)
    )
    assert (other.score, other.chosen["patches"]) == (usual.score, usual.chosen["patches"])
    assert usual.chosen["patches"] < 6 * 100  # the case is reached: not all patches have a class


def test_a_model_is_as_before_after_a_target_that_cannot_be_read(processor: Any, sets: Any) -> None:
    model = add_registers(load_vit(), num_registers=2)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    broken = [*sets[1][:2], (sets[1][2][0], np.zeros((8, 8, 3), np.int64))]
    with pytest.raises(ValueError, match="one number a pixel") as caught:
        evaluate_segmentation({"base": (model, None)}, sets[0][:4], broken, image_processor=processor, **QUICK)
    # The error is still held, as in a notebook.
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.training
    assert model.active_adapters == ["default"]
    with capture(model, attentions=False) as trace:
        model(pixel_values=torch.zeros(1, 3, 80, 80))
    assert trace.num_registers == 2, caught


# Layouts


def _save(path: Path, array: Any = None, size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size) if array is None else Image.fromarray(np.asarray(array))
    image.save(path)


def test_voc(tmp_path: Path) -> None:
    mask = np.array([[0, 20], [255, 3]], np.uint8)
    for name in ("a", "b", "c"):
        _save(tmp_path / "JPEGImages" / f"{name}.jpg")
        indexed = Image.new("P", (2, 2))
        indexed.putdata(mask.reshape(-1).tolist())
        indexed.putpalette([value for number in range(256) for value in (number, 0, 255 - number)])
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        indexed.save(tmp_path / "SegmentationClass" / f"{name}.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc\n")
    (lists / "val.txt").write_text("b\n")
    sets = read_masks(tmp_path)
    assert (sets.layout, len(sets.classes)) == ("VOC", 21)
    assert [[item.name for item in part] for part in sets[:2]] == [["a", "c"], ["b"]]
    assert sets.test[0].read().tolist() == [[0, 20], [-1, 3]]


def test_ade20k(tmp_path: Path) -> None:
    for part, name in (("training", "1"), ("validation", "2")):
        _save(tmp_path / "images" / part / f"{name}.jpg")
        _save(tmp_path / "annotations" / part / f"{name}.png", np.array([[0, 1], [150, 2]], np.uint8))
    sets = read_masks(tmp_path)
    assert (sets.layout, len(sets.train), len(sets.test)) == ("ADE20k", 1, 1)
    assert sets.train[0].read().tolist() == [[-1, 0], [149, 1]]


def test_pairs_of_one_folder_and_of_two(tmp_path: Path) -> None:
    for number in range(10):
        _save(tmp_path / "one" / "images" / "x" / f"{number}.jpg")
        _save(tmp_path / "one" / "masks" / "x" / f"{number}.png", np.full((2, 2), number, np.uint8))
        part = tmp_path / "two" / ("train" if number else "val")
        _save(part / "images" / f"{number}.jpg")
        _save(part / "labels" / f"{number}.png", np.full((2, 2), number, np.uint8))
    (tmp_path / "one" / "classes.txt").write_text("sky\nsea\n")
    sets = read_masks(tmp_path / "one")
    assert (len(sets.train), len(sets.test), sets.classes) == (8, 2, ("sky", "sea"))
    assert {item.read()[0, 0] for item in (*sets.train, *sets.test)} == set(range(10))
    again = read_masks(tmp_path / "one", seed=1)
    assert [item.name for item in again.test] != [item.name for item in sets.test]
    sets = read_masks(tmp_path / "two")
    assert (len(sets.train), [item.name for item in sets.test]) == (9, ["0"])
    (tmp_path / "one" / "masks" / "x" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"same names; alone: .*3\.jpg"):
        read_masks(tmp_path / "one")
    with pytest.raises(ValueError, match="must hold images/ and masks/"):
        read_masks(tmp_path / "one" / "images")


def test_nyu(tmp_path: Path) -> None:
    depths = np.full((480, 640), 2500, np.uint16)
    depths[100, 100] = 0
    for part in ("train", "test"):
        _save(tmp_path / part / "kitchen" / "rgb_00045.jpg")
        _save(tmp_path / part / "kitchen" / "sync_depth_00045.png", depths)
    sets = read_depths(tmp_path)
    read = sets.test[0].read()
    assert (sets.layout, sets.test[0].name) == ("NYU", "kitchen/rgb_00045.jpg")
    assert np.isfinite(read).sum() == (471 - 45) * (601 - 41) - 1
    assert np.nanmax(read) == pytest.approx(2.5)
    (tmp_path / "test" / "kitchen" / "sync_depth_00045.png").unlink()
    with pytest.raises(ValueError, match=r"no sync_depth_00045\.png"):
        read_depths(tmp_path)


def test_depths_in_metres(tmp_path: Path) -> None:
    for number in range(2):
        _save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "depth").mkdir(exist_ok=True)
        np.save(tmp_path / "depth" / f"{number}.npy", np.array([[1.5, np.inf]]))
    sets = read_depths(tmp_path, test_share=0.5)
    np.testing.assert_array_equal(sets.train[0].read(), np.array([[1.5, np.nan]], np.float32))
    np.save(tmp_path / "depth" / "0.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="no target that can be read"):
        [item.read() for part in read_depths(tmp_path, test_share=0.5)[:2] for item in part]


def test_a_mask_of_colours_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        _save(tmp_path / "images" / f"{number}.png")
        _save(tmp_path / "masks" / f"{number}.png")
    with pytest.raises(ValueError, match="one number a pixel"):
        read_masks(tmp_path, test_share=0.5).train[0].read()


@pytest.mark.parametrize("number", [2**16, 2**63 + 5])
def test_a_class_that_memory_does_not_hold_is_refused(number: int, model: Any, tmp_path: Path) -> None:
    mask = np.full((6, 8), number, np.uint64)
    for name in range(2):
        _save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "masks").mkdir(exist_ok=True)
        np.save(tmp_path / "masks" / f"{name}.npy", mask)
    with pytest.raises(ValueError, match=rf"npy: a mask must hold classes below 65,536, found {number}"):
        [item.read() for part in read_masks(tmp_path, test_share=0.5)[:2] for item in part]
    pairs = [(Image.new("RGB", (80, 80), colour), np.full((80, 80), number)) for colour in ("red", "blue")]
    with pytest.raises(ValueError, match=r"the target of train 0: a mask must hold classes below 65,536"):
        evaluate_segmentation(model, pairs[:1], pairs[1:], **QUICK)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for number in range(4):
        _save(tmp_path / "images" / f"{number}.png")
        _save(tmp_path / "depths" / f"{number}.png", np.ones((6, 8), np.uint16))
    np.save(tmp_path / "depths" / "1.npy", np.ones((6, 8)))
    with pytest.raises(ValueError, match=r"1\.npy and .*1\.png have one name"):
        read_depths(tmp_path)


def test_names_of_classes_that_are_no_text_are_refused_with_the_file(tmp_path: Path) -> None:
    for number in range(4):
        _save(tmp_path / "images" / f"{number}.png")
        _save(tmp_path / "masks" / f"{number}.png", np.ones((6, 8), np.uint8))
    (tmp_path / "classes.txt").write_bytes(b"sky\n\xff\n")
    with pytest.raises(ValueError, match=r"classes\.txt is not text in UTF-8"):
        read_masks(tmp_path)


def test_depths_are_the_same_whatever_kind_of_file_holds_them(tmp_path: Path) -> None:
    """Cropped alike, and without a warning of what float32 lacks."""
    metres = np.full((480, 640), 2.5)
    for number in range(2):
        _save(tmp_path / "images" / f"{number}.png")
    _save(tmp_path / "depths" / "0.png", (1000 * metres).astype(np.uint16))
    metres[0, 0] = 1e300
    np.save(tmp_path / "depths" / "1.npy", metres)
    first, second = (item.read() for part in read_depths(tmp_path, test_share=0.5)[:2] for item in part)
    np.testing.assert_array_equal(first, second)
    assert np.isfinite(first).sum() == (471 - 45) * (601 - 41)
