"""Procedural scenes: repeatable, with a ground truth that fits the image."""

import numpy as np
import pytest
from PIL import Image

from register_adapter.testbed import LABELS, SceneDataset, make_scene, photographs
from register_adapter.testbed.scenes import _PHOTOGRAPHS


@pytest.mark.parametrize("size", [32, 80, 224])
def test_mask_and_box_fit_the_image(size):
    for seed in range(20):
        scene = make_scene(seed, size)
        assert scene.image.shape == (size, size, 3)
        assert scene.image.dtype == np.uint8
        for thing in scene.objects:
            x0, y0, x1, y1 = thing.box
            assert thing.mask[y0:y1, x0:x1].sum() == thing.mask.sum() > 0
            assert thing.mask[y0].any()
            assert thing.mask[y1 - 1].any()
            assert thing.mask[:, x0].any()
            assert thing.mask[:, x1 - 1].any()


def test_the_shape_has_its_colour_and_the_background_has_not():
    for seed in range(30):
        scene = make_scene(seed, 80)
        if not LABELS[scene.label].startswith("red"):
            continue
        red, green, blue = (scene.image[scene.mask][:, channel].astype(float).mean() for channel in range(3))
        assert red > green + 60
        assert red > blue + 60


def test_the_main_shape_is_more_than_twice_the_distractor():
    pairs = [scene.objects for scene in (make_scene(seed, 80) for seed in range(60)) if len(scene.objects) == 2]
    assert len(pairs) > 10
    # Shapes fill their circles differently, so compare the boxes.
    for main, other in pairs:
        area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (main.box, other.box)]
        assert area[0] > 1.5 * area[1]
        assert not (main.mask & other.mask).any()


def test_an_item_depends_on_seed_and_index_alone():
    first, second = SceneDataset(50, seed=3), SceneDataset(10, seed=3)
    assert np.array_equal(first.scene(7).image, second.scene(7).image)
    assert not np.array_equal(first.scene(7).image, first.scene(8).image)
    assert not np.array_equal(first.scene(7).image, SceneDataset(50, seed=4).scene(7).image)


def test_every_class_occurs():
    assert {make_scene(seed, 32).label for seed in range(600)} == set(range(len(LABELS)))


def test_the_splits_share_no_photograph():
    assert not set(_PHOTOGRAPHS["train"]) & set(_PHOTOGRAPHS["test"])
    assert all(image.mode == "RGB" for split in ("train", "test") for image in photographs(split))


def test_written_as_an_image_folder(tmp_path):
    scenes = SceneDataset(6, size=32, seed=1, split=None)
    scenes.write(tmp_path)
    files = sorted(tmp_path.glob("*/*.png"))
    assert len(files) == 6
    for file in files:
        index = int(file.stem)
        assert file.parent.name == LABELS[scenes.scene(index).label].replace(" ", "_")
        assert np.array_equal(np.asarray(Image.open(file)), scenes.scene(index).image)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 16 pixels"):
        make_scene(0, 8)
    with pytest.raises(IndexError, match="scene 3 of a set of 3"):
        SceneDataset(3, split=None).scene(3)
