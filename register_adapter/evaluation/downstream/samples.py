"""Labelled images for training and for test, and whether an image is in both."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from tqdm.auto import tqdm

from ...data.folders import read_image_folder
from ...data.images import check_image, image_name
from ...tuner.hooks.call_state import outside_of_readings
from ...utils.files import open_regular

__all__ = ["LabelledImages", "digest_of", "label_images", "name_of", "refuse_leaks"]

_Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelledImages:
    """Images and the classes that they are of.

    Attributes:
        images: A sequence of image files, images or pixel values ``(3, H, W)``, without labels.
        labels: ``(n,)`` int64.
        classes: Names of the classes.
    """

    images: Sequence[Any] = field(repr=False)
    labels: _Labels
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class _Unlabelled(Sequence[Any]):
    """The images of a data set's items."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    @outside_of_readings()
    def __getitem__(self, index: Any) -> Any:
        item = self.source[int(index)]
        return item["image"] if isinstance(item, Mapping) and "image" in item else item

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


@outside_of_readings()
def label_images(data: Any, classes: Sequence[str] | None = None) -> LabelledImages:
    """Any labelled images in one form.

    Args:
        data: A folder with one sub-folder per class; a data set whose items have ``"image"`` and ``"label"``; a pair of
            images (a sequence, or a tensor ``(n, 3, H, W)``) and their labels; or :class:`LabelledImages`.
        classes: Names of the classes, those of the training set for a test set.

    Raises:
        ValueError: The data are something else, a label is missing, is no whole number or is of no class.
    """
    if isinstance(data, str | Path):
        data = read_image_folder(data, classes)
    if isinstance(data, LabelledImages):
        labelled = data
    elif isinstance(data, tuple) and len(data) == 2:
        given: Any = data[0] if isinstance(data[0], torch.Tensor) else _Unlabelled(data[0])
        labelled = LabelledImages(given, _whole(data[1]), tuple(classes or ()))
    elif isinstance(data, Dataset):
        labelled = _of_dataset(data, classes)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        first = data[0] if len(data) else None
        if not (isinstance(first, Mapping) and {"image", "label"} <= set(first)):
            raise ValueError(f"items of a labelled data set have 'image' and 'label', found {type(first).__name__}")
        labels = _whole([data[index]["label"] for index in range(len(data))])
        labelled = LabelledImages(_Unlabelled(data), labels, tuple(classes or ()))
    else:
        raise ValueError(
            "labelled images are a folder with a sub-folder per class, a data set with 'image' and 'label', or a pair "
            f"(images, labels); found {type(data).__name__}"
        )
    if len(labelled.images) != len(labelled.labels) or not len(labelled):
        raise ValueError(f"{len(labelled.images)} images have {len(labelled.labels)} labels; each needs one")
    names = labelled.classes or tuple(str(number) for number in range(int(labelled.labels.max()) + 1))
    if labelled.labels.min() < 0 or (classes is None and labelled.labels.max() >= len(names)):
        raise ValueError(f"labels must be from 0 to {len(names) - 1}, found {labelled.labels.max()}")
    return LabelledImages(labelled.images, labelled.labels, names)


def _of_dataset(data: Dataset, classes: Sequence[str] | None) -> LabelledImages:
    if not {"image", "label"} <= set(data.column_names):
        raise ValueError(f"the data set needs the columns 'image' and 'label', found {data.column_names}")
    if isinstance(data.features["image"], ImageFeature):
        data = data.cast_column("image", ImageFeature(decode=False))  # so that files are compared, not pixels
    own = tuple(getattr(data.features["label"], "names", None) or ())
    labels = _whole(data["label"])
    if own and classes and own != tuple(classes):
        labels, own = _numbered_as(labels, own, classes), tuple(classes)
    return LabelledImages(_Unlabelled(data), labels, own or tuple(classes or ()))


def _numbered_as(labels: _Labels, own: Sequence[str], classes: Sequence[str]) -> _Labels:
    """Labels of a set with names of its own, by the numbers that the training set has for these names.

    Raises:
        ValueError: An image is of a class that the training set lacks.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    used = sorted({own[label] for label in labels.tolist() if 0 <= label < len(own)})
    unknown = [name for name in used if name not in numbers]
    if unknown and list(classes) == [str(number) for number in range(len(classes))]:
        return labels  # the training set has no names: numbers are all that there is
    if unknown:
        raise ValueError(f"the test set has the classes {unknown!r:.200}, which the training set lacks")
    places = [numbers[own[label]] if 0 <= label < len(own) else -1 for label in labels.tolist()]
    return np.array(places, np.int64)


def _whole(labels: Any) -> _Labels:
    values = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else list(labels))
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(f"labels must be one whole number an image, found {values.dtype} {values.shape}")
    return values.astype(np.int64)


def refuse_leaks(train: Sequence[Any], test: Sequence[Any], progress: bool = False) -> None:
    """Refuse a test image that is a training image too, by the content of files or the pixels of images.

    Args:
        train: Images of the one set.
        test: Images of the other.
        progress: Show a progress bar.

    Raises:
        ValueError: An image is in both; a few are named.
    """
    sizes = [{_size_of(image) for image in images} for images in (train, test)]
    both = sizes[0] & sizes[1]  # files of other sizes differ, and need not be read
    if not both:
        return
    with tqdm(total=len(train) + len(test), desc="compare files", unit="image", disable=not progress) as bar:

        def digests(images: Sequence[Any]) -> Iterator[tuple[str, int]]:
            for number, image in enumerate(images):
                bar.update()
                if _size_of(image) in both:
                    yield digest_of(image), number

        learned = dict(digests(train))
        pairs = [(number, learned[digest]) for digest, number in digests(test) if digest in learned]
    # Damaged files, such as empty ones, are like each other; they are left out later.
    shared = [(name_of(test[a], a), name_of(train[b], b)) for a, b in pairs if not _is_bad(test[a])]
    if shared:
        named = "; ".join(name if name == other else f"{name} is {other}" for name, other in shared[:5])
        raise ValueError(
            f"{len(shared)} of {len(test)} test images are training images too, which would flatter every model: "
            f"{named}{' …' if len(shared) > 5 else ''}. Take them out of one of the sets"
        )


def name_of(image: Any, number: int) -> str:
    """What to call an image: its file, or its number."""
    name = image_name(image)
    return f"image {number}" if name.endswith("without a name") else name


def digest_of(image: Any) -> str:
    """A hash of a file's content, or of an image's pixels; a file that cannot be read has its name's."""
    digest = hashlib.sha256()
    stream = _stream(image)
    if stream is None:
        digest.update(_pixels(image))
    else:
        try:
            with stream() as file:
                while part := file.read(2**20):
                    digest.update(part)
        except OSError:
            digest.update(name_of(image, 0).encode())
    return digest.hexdigest()


def _is_bad(image: Any) -> bool:
    return not isinstance(image, torch.Tensor) and check_image(image) is not None


def _size_of(image: Any) -> Hashable:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str | Path):
        try:
            return Path(image).stat().st_size
        except OSError:
            return -1
    if isinstance(image, bytes):
        return len(image)
    return (image.size, image.mode) if isinstance(image, Image.Image) else tuple(image.shape)


def _stream(image: Any) -> Callable[[], Any] | None:
    """How the file of an image is opened, ``None`` where there are only pixels."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return lambda: io.BytesIO(image)
    return (lambda: open_regular(image)) if isinstance(image, str | Path) else None


def _pixels(image: Any) -> bytes:
    if isinstance(image, torch.Tensor):
        return image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return np.asarray(image).tobytes()
