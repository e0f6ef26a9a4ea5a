"""Images with true boxes: the VOC devkit's layout, COCO's JSON, and the scenes of the test bed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from ...utils.files import open_regular, parse_json

__all__ = ["BoxedImage", "boxed_scenes", "read_coco", "read_lines", "read_voc"]


@dataclass(frozen=True, eq=False)
class BoxedImage:
    """An image and where its objects are.

    Attributes:
        image: A path, a PIL image, or normalised pixel values ``(3, H, W)``.
        boxes: ``(n, 4)`` float64, x0 y0 x1 y1 in pixels, half open.
        name: What to call it.
    """

    image: Any
    boxes: npt.NDArray[np.float64]
    name: str


class _Scenes(Protocol):
    def __len__(self) -> int: ...

    def scene(self, index: int) -> Any: ...


def boxed_scenes(scenes: _Scenes) -> list[BoxedImage]:
    """The scenes of a test bed's set, with the boxes of all of their objects.

    Args:
        scenes: A :class:`~register_adapter.testbed.SceneDataset`.
    """
    made = (scenes.scene(index) for index in range(len(scenes)))
    return [
        BoxedImage(scene.pil, np.array([item.box for item in scene.objects], np.float64), f"scene {number}")
        for number, scene in enumerate(made)
    ]


def read_voc(
    folder: str | Path, split: str = "trainval", *, difficult: bool = True, truncated: bool = True
) -> list[BoxedImage]:
    """Images and boxes of a VOC devkit: ``Annotations/``, ``JPEGImages/`` and ``ImageSets/Main/<split>.txt``.

    Objects marked as difficult or truncated count as any other, as in the code of LOST and of TokenCut, which leave
    both out with ``--no_hard`` alone. Annotations count pixels from 1 and include the last one; a box here starts at 0
    and ends behind the last.

    Args:
        folder: The folder of a year, ``VOCdevkit/VOC2007``, or ``VOCdevkit`` where it holds one year.
        split: Name of a list of images.
        difficult: Keep objects that are marked as difficult.
        truncated: Keep objects that are marked as truncated.

    Returns:
        One entry a line of the list; an image whose objects are all left out has no boxes.

    Raises:
        ValueError: The layout is another one, or an annotation cannot be read.
    """
    root = _year(Path(folder))
    names = read_lines(root / "ImageSets" / "Main" / f"{split}.txt")
    return [
        BoxedImage(
            root / "JPEGImages" / f"{name}.jpg",
            _voc_boxes(root / "Annotations" / f"{name}.xml", difficult, truncated),
            name,
        )
        for name in names
    ]


def _year(folder: Path) -> Path:
    if (folder / "Annotations").is_dir():
        return folder
    years = sorted(path for path in folder.glob("VOC*") if (path / "Annotations").is_dir())
    if len(years) != 1:
        seen = f"it holds {', '.join(path.name for path in years)}; name one of them" if years else "it has neither"
        raise ValueError(f"{folder} must hold Annotations/ and ImageSets/, or the folder of one year; {seen}")
    return years[0]


def read_lines(path: Path) -> list[str]:
    """The first word of each line of a list of images, plain names.

    Raises:
        ValueError: There is no such file, or it names none, or something that is not a plain name.
    """
    if not path.is_file():
        near = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt") if "_" not in other.stem))
        raise ValueError(f"there is no list of images {path}; there are {near or 'none'}")
    try:
        with open_regular(path) as file:
            names = [line.split()[0].decode() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    if not names:
        raise ValueError(f"{path} names no images")
    if strange := [name for name in names if Path(name).name != name or "\0" in name]:
        raise ValueError(f"{path} must hold names of images, found {strange[0]!r:.80}")
    return names


def _voc_boxes(path: Path, difficult: bool, truncated: bool) -> npt.NDArray[np.float64]:
    boxes = []
    try:
        with open_regular(path) as file:
            objects = ElementTree.parse(file).getroot().findall("object")
        for item in objects:
            unwanted = [name for name, kept in (("difficult", difficult), ("truncated", truncated)) if not kept]
            if any(_is_marked(item.findtext(name), name) for name in unwanted):
                continue
            box = [float(item.findtext(f"bndbox/{name}") or "nothing") for name in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append([box[0] - 1, box[1] - 1, box[2], box[3]])
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:  # LookupError: an unknown encoding
        raise ValueError(f"{path} is not an annotation of VOC's kind: {error}") from error
    return _checked(boxes, str(path))


def read_coco(file: str | Path, folder: str | Path, *, crowd: bool = False) -> list[BoxedImage]:
    """Images and boxes of a COCO annotation file (``instances_*.json``).

    Boxes are rounded to whole pixels, as in the code of LOST and of TokenCut, and those of crowds are left out.

    Args:
        file: The JSON file.
        folder: Folder of the images.
        crowd: Keep boxes of crowds.

    Returns:
        One entry an image of the file, in its order; an image without objects has no boxes.

    Raises:
        ValueError: The file is not of that kind.
    """
    path = Path(file)
    try:
        with open_regular(path) as opened:
            content = parse_json(opened.read())
        images = [(item["id"], str(item["file_name"])) for item in content["images"]]
        "".join(name for _, name in images).encode()  # half of a surrogate pair is the name of no file
        boxes: dict[Any, list[list[float]]] = {number: [] for number, _ in images}
        for item in content["annotations"]:
            if crowd or not _is_marked(item.get("iscrowd"), "iscrowd"):
                x, y, width, height = (float(value) for value in item["bbox"])
                boxes[item["image_id"]].append([float(round(v)) for v in (x, y, x + width, y + height)])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not an annotation file of COCO's kind: {error!r:.200}") from error
    if not images:
        raise ValueError(f"{path} has no images")
    if len(boxes) < len(images):
        twice = Counter(number for number, _ in images).most_common(1)[0][0]
        raise ValueError(f"{path} has several images with the id {twice!r:.80}: whose its boxes are is not known")
    if strange := [name for _, name in images if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"{path} names a file outside the folder of the images: {strange[0]!r:.80}")
    if strange := [name for _, name in images if "\0" in name]:
        raise ValueError(f"{path} names a file by what is no name of one: {strange[0]!r:.80}")
    return [
        BoxedImage(Path(folder) / name, _checked(boxes[number], f"{path}, image {number}"), name)
        for number, name in images
    ]


def _is_marked(mark: Any, name: str) -> bool:
    """What a file says of an object by 0 or 1, a number or text, or not at all."""
    text = mark.strip() if isinstance(mark, str) else mark
    if text in (None, "", 0, "0"):
        return False
    if text in (1, "1"):
        return True
    raise ValueError(f"{name} must be 0 or 1, found {mark!r:.80}")


def _checked(boxes: Sequence[Sequence[float]], place: str) -> npt.NDArray[np.float64]:
    array = np.array(boxes, np.float64).reshape(-1, 4)
    if not (np.isfinite(array).all() and (array[:, 2:] >= array[:, :2]).all()):
        raise ValueError(f"{place}: a box must be finite and end behind its start, found {array.tolist()!r:.200}")
    return array
