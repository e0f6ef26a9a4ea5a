"""Images with a target for every pixel: masks of classes, or depths; the layouts that they come in."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ...data.images import walk_files
from ...errors import MissingExtraError
from ...utils.files import open_regular, read_text
from ..discovery.annotations import read_lines

__all__ = [
    "DenseImage",
    "DenseSets",
    "distance_scenes",
    "mask_scenes",
    "read_depths",
    "read_masks",
]

_Array = npt.NDArray[Any]
_Convert = Callable[[_Array], _Array]
#: Mark of a pixel without a class; 255 in files.
IGNORED, _VOID = -1, 255
_MOST_CLASSES = 2**16  # what 16 bits hold: counts of each class take memory
# EXIF's tag, and its values of images that lie on a side.
_ORIENTATION, _ON_ITS_SIDE = 0x0112, range(5, 9)
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclass(frozen=True, eq=False)
class DenseImage:
    """An image and a target for each of its pixels.

    Attributes:
        image: A path or a PIL image.
        target: ``(H, W)`` array, or a file: an image with a number a pixel, or ``.npy``.
        name: What to call it.
        convert: Makes of what is in the file classes (int64, -1 for none) or depths (float32, NaN for none).
    """

    image: Any
    target: Any
    name: str
    convert: _Convert | None = None

    def read(self) -> _Array:
        """The target ``(H, W)``.

        Raises:
            ValueError: It cannot be read, is no single number a pixel, or has another shape than the image.
        """
        is_file = isinstance(self.target, str | Path)
        place = self.target if is_file else f"the target of {self.name}"
        raw = _read(Path(self.target)) if is_file else np.asarray(self.target)
        if raw.ndim != 2 or not raw.size or raw.dtype.kind not in "biuf":
            raise ValueError(f"{place} must be one number a pixel (H, W), found {raw.dtype} {raw.shape}")
        if sides := _other_sides(self.image, raw.shape):
            raise ValueError(
                f"{place} is {raw.shape[1]} × {raw.shape[0]} pixels, and its image {sides[0]} × {sides[1]}: they do "
                "not cover the same (an image that EXIF turns is taken upright)"
            )
        try:
            return raw if self.convert is None else self.convert(raw)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


class DenseSets(NamedTuple):
    """A training set, a test set, and the names of classes (none where targets are no classes)."""

    train: Sequence[DenseImage]
    test: Sequence[DenseImage]
    classes: tuple[str, ...] = ()
    layout: str = ""


def _read(path: Path) -> _Array:
    try:
        with open_regular(path) as file:
            content = io.BytesIO(file.read())
        if path.suffix.lower() == ".npy":
            array: _Array = np.load(content, allow_pickle=False)
            return array
        with Image.open(content) as image:
            return np.asarray(image)
    except UnidentifiedImageError as error:  # whose text is an address in memory
        raise ValueError(f"{path} is no target that can be read: not an image, or its header is damaged") from error
    except Exception as error:  # Pillow raises whatever a decoder does
        raise ValueError(f"{path} is no target that can be read: {type(error).__name__}: {error}") from error


def _other_sides(image: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Width and height of an image, upright, if a target ``(H, W)`` of any resolution does not cover it."""
    try:
        with Image.open(image) if isinstance(image, str | Path) else nullcontext(image) as opened:
            width, height = opened.size
            if opened.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE:
                width, height = height, width
    except Exception:  # bad images are named where they are read
        return None
    # Half a pixel of the target, which may be rounded, at either end of a side.
    fits = abs(shape[1] * height - shape[0] * width) <= max(width, height)
    return None if fits else (width, height)


def checked_classes(raw: _Array) -> _Array:
    """Classes of an array as int64.

    Raises:
        ValueError: They are no whole numbers, or one is beyond 16 bits.
    """
    if raw.dtype.kind not in "iub":
        raise ValueError(f"a mask must hold whole numbers, found {raw.dtype}")
    if raw.max() >= _MOST_CLASSES:
        raise ValueError(f"a mask must hold classes below {_MOST_CLASSES:,}, found {raw.max()}")
    return raw.astype(np.int64)


def to_classes(raw: _Array, first: int = 0) -> _Array:
    """Classes of an indexed image, counted from ``first``; 255 and what is below ``first`` is none."""
    values = checked_classes(raw)
    return np.where((values == _VOID) | (values < first), IGNORED, values - first)


def to_depths(raw: _Array, scale: float = 1.0, crop: bool = False) -> _Array:
    """Depths of a file's numbers, divided by ``scale``; 0, what is not finite and what is cropped off is none."""
    with np.errstate(over="ignore"):  # what float32 lacks is not finite, and none
        values: _Array = raw.astype(np.float32) / np.float32(scale)
    values[~np.isfinite(values) | (values <= 0)] = np.nan
    if crop and values.shape == _NYU_SIZE:
        kept: _Array = np.full_like(values, np.nan)
        kept[_EIGEN] = values[_EIGEN]
        return kept
    return values


#: The part of NYU's images that Eigen et al. measure on, as everybody after them.
_NYU_SIZE, _EIGEN = (480, 640), (slice(45, 471), slice(41, 601))


# Folders


def read_masks(folder: str | Path, test_share: float = 0.2, seed: int = 0) -> DenseSets:
    """Images and masks of classes in VOC's layout, ADE20k's, or any folder of pairs.

    * VOC: ``JPEGImages/``, ``SegmentationClass/`` and ``ImageSets/Segmentation/{train,val}.txt``; 255 is no class.
    * ADE20k: ``images/{training,validation}/`` and ``annotations/{training,validation}/``; 0 is no class, 1 the first.
    * Pairs: ``images/`` and ``masks/`` (or ``labels/``, ``annotations/``) with files of the same names, in ``train/``
      and ``test/`` (or ``val/``, ``validation/``), or without, and then a share of them, drawn at random, is the test
      set. A mask is an image of one number a pixel; 255 is no class. ``classes.txt`` may name the classes, one a line.

    Args:
        folder: The folder.
        test_share: Share of the pairs for the test, where there are no two sets.
        seed: Seed of the draw.

    Raises:
        ValueError: The folder has none of these layouts, an image has no mask, or a mask no image.
    """
    root = _folder(folder)
    if (root / "SegmentationClass").is_dir():
        train, test = (_voc(root, split) for split in ("train", "val"))
        return DenseSets(train, test, VOC_CLASSES, "VOC")
    if (root / "annotations" / "training").is_dir():
        both = [
            _pairs(root / "images" / part, root / "annotations" / part, partial(to_classes, first=1))
            for part in ("training", "validation")
        ]
        return DenseSets(both[0], both[1], _class_names(root), "ADE20k")
    train, test = _two_sets(root, ("masks", "labels", "annotations"), to_classes, test_share, seed)
    return DenseSets(train, test, _class_names(root), "pairs")


def read_depths(
    folder: str | Path, test_share: float = 0.2, seed: int = 0, *, scale: float = 1000.0, crop: bool = True
) -> DenseSets:
    """Images and depths in the layout of NYU Depth v2, or any folder of pairs.

    * NYU: ``{train,test}/<scene>/rgb_00045.jpg`` beside ``sync_depth_00045.png``, millimetres in 16 bits.
    * Pairs: ``images/`` and ``depths/`` (or ``depth/``), see :func:`read_masks`; files are images of 16 bits, or
      ``.npy`` in metres.

    Args:
        folder: The folder.
        test_share: Share of the pairs for the test, where there are no two sets.
        seed: Seed of the draw.
        scale: Numbers of an image file that make a metre. 0 is no depth.
        crop: Measure images of 480 × 640 in the part that Eigen et al. did.

    Raises:
        ValueError: The folder has none of these layouts, or an image has no depths.
    """
    root = _folder(folder)
    convert = partial(to_depths, scale=scale, crop=crop)
    parts = [sorted((root / part).rglob("rgb_*.jpg")) for part in ("train", "test")]
    if all(parts):
        both = [
            [
                DenseImage(path, _depth_of(path), f"{path.parent.name}/{path.name}", convert)
                for path in paths
                if path.is_file()
            ]
            for paths in parts
        ]
        return DenseSets(both[0], both[1], (), "NYU")
    train, test = _two_sets(root, ("depths", "depth"), convert, test_share, seed)
    return DenseSets(train, test, (), "pairs")


def _depth_of(path: Path) -> Path:
    target = path.with_name(path.name.replace("rgb_", "sync_depth_", 1)).with_suffix(".png")
    if not target.is_file():
        raise ValueError(f"{path} has no depths: there is no {target.name} beside it")
    return target


def _folder(folder: str | Path) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    return root


def _voc(root: Path, split: str) -> list[DenseImage]:
    return [
        DenseImage(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png", name, to_classes)
        for name in read_lines(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    ]


def _class_names(root: Path) -> tuple[str, ...]:
    path = root / "classes.txt"
    if not path.is_file():
        return ()
    return tuple(line.strip() for line in read_text(path).split("\n") if line.strip())


def _two_sets(
    root: Path, targets: Sequence[str], convert: _Convert, share: float, seed: int
) -> tuple[list[DenseImage], list[DenseImage]]:
    """The pairs of a training and a test folder, or those of one folder, split at random."""

    def pairs(place: Path) -> list[DenseImage]:
        name = next((name for name in targets if (place / name).is_dir()), None)
        if name is None or not (place / "images").is_dir():
            seen = sorted(path.name for path in place.iterdir() if path.is_dir())
            raise ValueError(f"{place} must hold images/ and {targets[0]}/ with files of the same names, found {seen}")
        return _pairs(place / "images", place / name, convert)

    tests = [root / name for name in ("test", "val", "validation") if (root / name).is_dir()]
    if (root / "train").is_dir() and tests:
        return pairs(root / "train"), pairs(tests[0])
    every = pairs(root)
    count = round(share * len(every))
    if not 0 < count < len(every):
        raise ValueError(f"{len(every)} pairs of {root} leave none to learn from, or none to test with; add some")
    drawn = set(np.random.default_rng(seed).permutation(len(every))[:count].tolist())
    return (
        [item for number, item in enumerate(every) if number not in drawn],
        [item for number, item in enumerate(every) if number in drawn],
    )


def _pairs(images: Path, targets: Path, convert: _Convert) -> list[DenseImage]:
    """Files of the same names in two folders."""
    by_name = [_by_stem(folder) for folder in (images, targets)]
    alone = [str(path) for mine, other in (by_name, by_name[::-1]) for name, path in mine.items() if name not in other]
    if alone or not by_name[0]:
        raise ValueError(f"{images} and {targets} must hold files of the same names; alone: {alone[:5] or 'no files'}")
    # What .npy holds is metres, whatever the scale of images.
    metres = partial(convert, scale=1.0) if isinstance(convert, partial) and convert.func is to_depths else convert
    return [
        DenseImage(path, by_name[1][name], name, metres if by_name[1][name].suffix.lower() == ".npy" else convert)
        for name, path in by_name[0].items()
    ]


def _by_stem(folder: Path) -> Mapping[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    found: dict[str, Path] = {}
    for path in walk_files(folder):
        if (first := found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)) is not path:
            raise ValueError(f"{first} and {path} have one name, by which an image is matched with its target")
    return found


# Scenes


class _Scenes(Protocol):
    def __len__(self) -> int: ...

    def scene(self, index: int) -> Any: ...


def _scenes(scenes: _Scenes) -> Iterable[tuple[int, Any]]:
    return ((index, scenes.scene(index)) for index in range(len(scenes)))


def mask_scenes(scenes: _Scenes) -> list[DenseImage]:
    """Scenes of the test bed with their masks: 0 is the background, the class of a shape its label + 1.

    Args:
        scenes: A :class:`~register_adapter.testbed.SceneDataset`.
    """
    items = []
    for index, scene in _scenes(scenes):
        mask = np.zeros(scene.mask.shape, np.int64)
        for shape in scene.objects:
            mask[shape.mask] = shape.label + 1
        items.append(DenseImage(scene.pil, mask, f"scene {index}"))
    return items


def distance_scenes(scenes: _Scenes) -> list[DenseImage]:
    """Scenes of the test bed with the distance of each pixel to the nearest shape, in sides of the image.

    Args:
        scenes: A :class:`~register_adapter.testbed.SceneDataset`.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    try:
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise MissingExtraError("distances to shapes", "scipy", "testbed") from error

    items = []
    for index, scene in _scenes(scenes):
        shapes = np.logical_or.reduce([shape.mask for shape in scene.objects])
        distances = distance_transform_edt(~shapes) / shapes.shape[0]
        items.append(DenseImage(scene.pil, distances.astype(np.float32), f"scene {index}"))
    return items
