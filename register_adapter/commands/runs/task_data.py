"""The data of an evaluation by its name: a training and a test set from a folder, or drawn scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...data.folders import read_image_folder, split_at_random
from ...data.images import named_folder
from ...evaluation.discovery import boxed_scenes, read_coco, read_voc
from ...evaluation.downstream import (
    LabelledImages,
    distance_scenes,
    label_images,
    mask_scenes,
    read_depths,
    read_masks,
)
from ...testbed import LABELS, SceneDataset

__all__ = ["TaskData", "load_task_data"]

_SCENES = "scenes"
#: Drawn scenes: seeds and numbers of the two sets, which have other photographs behind them.
_TRAIN_SEED, _TEST_SEED, _NUM_TRAIN, _NUM_TEST = 40_001, 40_002, 512, 256
_TESTS = ("test", "val", "validation")
#: Share of a folder without two sets that is the test set.
_SHARE = 0.2


class TaskData(NamedTuple):
    """What a task is given; ``train`` is ``None`` where nothing is learned."""

    train: Any
    test: Any
    classes: tuple[str, ...] = ()
    layout: str = ""


def load_task_data(
    task: str,
    name: str,
    *,
    max_images: int | None = None,
    seed: int = 0,
    annotations: str | None = None,
    split: str = "trainval",
) -> TaskData:
    """Read the data of a task.

    Args:
        task: Name of the task.
        name: A folder, or ``"scenes"``.
        max_images: At most so many images of each set, at random.
        seed: Seed of that, and of the test set where there is only one folder.
        annotations: For discovery a COCO annotation file, of the images in the folder.
        split: For discovery the list of images of a VOC devkit.

    Raises:
        ValueError: The folder does not have the layout of the task.
        OSError: It cannot be read.
    """
    if name == _SCENES and not Path(name).exists():
        return _LOADERS[task].scenes(
            SceneDataset(max_images or _NUM_TRAIN, seed=_TRAIN_SEED, split="train"),
            SceneDataset(max_images or _NUM_TEST, seed=_TEST_SEED, split="test"),
        )
    root = named_folder(name)
    if task == "discovery":
        boxed = read_coco(annotations, root) if annotations else read_voc(root, split)
        return TaskData(None, _some(boxed, max_images, seed), (), "COCO" if annotations else f"VOC {split}")
    data = _LOADERS[task].folder(root, seed)
    return data._replace(train=_some(data.train, max_images, seed), test=_some(data.test, max_images, seed))


def _some(items: Any, most: int | None, seed: int) -> Any:
    """At most so many of the items, at random and in their order."""
    if items is None or most is None or len(items) <= most:
        return items
    chosen = np.sort(np.random.default_rng(seed).permutation(len(items))[:most])
    if isinstance(items, LabelledImages):
        images = [items.images[number] for number in chosen.tolist()]
        return LabelledImages(images, items.labels[chosen], items.classes)
    return [items[number] for number in chosen.tolist()]


def class_folders(task: str, name: str) -> list[Path]:
    """Folders in which a task takes every sub-folder for a class, so that an output does not belong there."""
    root = Path(name)
    return (_sets(root) or [root]) if _LOADERS[task].by_class else []


def _sets(root: Path) -> list[Path]:
    """The training and the test folder, if there are both."""
    tests = [root / name for name in _TESTS if (root / name).is_dir()]
    return [root / "train", tests[0]] if tests and (root / "train").is_dir() else []


def _class_folders(root: Path, seed: int) -> TaskData:
    """A training and a test folder with one sub-folder per class each, or one such folder, split at random."""
    if sets := _sets(root):
        train = label_images(sets[0])
        return TaskData(train, label_images(sets[1], train.classes), train.classes, f"train, {sets[1].name}")
    train, test = map(label_images, split_at_random(read_image_folder(root), _SHARE, seed, root))
    return TaskData(train, test, train.classes, f"{_SHARE:.0%} drawn for the test")


def _tested_folder(root: Path, seed: int) -> TaskData:
    """The test folder, or the folder itself, where nothing is learned."""
    sets = _sets(root)
    test = label_images(sets[1] if sets else root)
    return TaskData(None, test, test.classes, sets[1].name if sets else "all images")


def _labelled_scenes(scenes: SceneDataset) -> LabelledImages:
    drawn = list(scenes)
    return LabelledImages([item["image"] for item in drawn], np.array([item["label"] for item in drawn]), LABELS)


def _dense(read: Callable[..., Any]) -> Callable[[Path, int], TaskData]:
    def folder(root: Path, seed: int) -> TaskData:
        sets = read(root, _SHARE, seed)
        return TaskData(sets.train, sets.test, sets.classes, sets.layout)

    return folder


class _Loader(NamedTuple):
    """How a task's data is read from a folder, and made of scenes; whether each sub-folder is a class."""

    folder: Callable[[Path, int], TaskData]
    scenes: Callable[[SceneDataset, SceneDataset], TaskData]
    by_class: bool = False


def _of_scenes(
    make: Callable[[SceneDataset], Any], classes: Sequence[str] = (), *, learns: bool = True
) -> Callable[[SceneDataset, SceneDataset], TaskData]:
    def scenes(train: SceneDataset, test: SceneDataset) -> TaskData:
        return TaskData(make(train) if learns else None, make(test), tuple(classes), "drawn scenes")

    return scenes


_CLASSES = _Loader(_class_folders, _of_scenes(_labelled_scenes, LABELS), by_class=True)
_LOADERS: dict[str, _Loader] = {
    "knn": _CLASSES,
    "linear": _CLASSES,
    "segmentation": _Loader(_dense(read_masks), _of_scenes(mask_scenes, ("background", *LABELS))),
    "depth": _Loader(_dense(read_depths), _of_scenes(distance_scenes)),
    "zero-shot": _Loader(_tested_folder, _of_scenes(_labelled_scenes, LABELS, learns=False), by_class=True),
    "discovery": _Loader(_tested_folder, _of_scenes(boxed_scenes, learns=False)),
}
