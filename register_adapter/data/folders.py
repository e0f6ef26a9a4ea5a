"""Image folders as data sets: one sub-folder per class, or a heap of images without classes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path, PurePath

from accelerate import PartialState
from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets import Sequence as Several

from ..utils.files import open_regular, parse_json
from ..utils.text import first_few, path_text, printable
from .images import leads_up, named_folder, walk_files

__all__ = ["read_captioned_folder", "read_flat_folder", "read_image_folder", "split_at_random"]

logger = logging.getLogger(__name__)
_CAPTIONS = "metadata.jsonl"


def read_image_folder(folder: str | Path, labels: Sequence[str] | None = None) -> Dataset:
    """List an image folder, one sub-folder per class; files are listed whatever they are, and none is opened.

    Classes are the sorted names of the sub-folders, empty ones and ones full of bad files included, so that what is
    skipped later never shifts a label. Files of deeper folders belong to their class; hidden files and folders are left
    out, and files beside the class folders are skipped with a warning.

    Args:
        folder: The folder.
        labels: Classes to use, those of the training set, for a validation folder that may lack some.

    Returns:
        Columns ``image`` (undecoded ``datasets.Image``) and ``label`` (``datasets.ClassLabel``).

    Raises:
        ValueError: The folder does not exist, has no sub-folders, has classes that ``labels`` lacks, or two whose names
            are shown as one.
        OSError: It cannot be listed.
    """
    root = named_folder(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    visible = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    classes = [path for path in visible if path.is_dir() and not leads_up(path)]
    shown = [printable(path.name) for path in classes]
    names = list(labels) if labels is not None else shown
    if not classes:
        raise ValueError(f"{root} has no sub-folders; expected one for each class, such as {root}/cat/1.jpg")
    if len(set(shown)) < len(shown):
        twice = next(name for name in shown if shown.count(name) > 1)
        found = [os.fsencode(path.name) for path in classes if printable(path.name) == twice]
        raise ValueError(f"{root} has {len(found)} class folders that are shown as {twice!r}: {found}; rename one")
    unknown = [name for name in shown if name not in names]
    if unknown:
        raise ValueError(f"{root} has the classes {unknown}, which the training set lacks; it has {names}")
    loose = [printable(path.name) for path in visible if path not in classes]
    if loose and PartialState().is_main_process:
        logger.warning("%s: files outside the class folders are not used: %s", root, first_few(loose))
    files = [
        (path_text(path), names.index(printable(class_folder.name)))
        for class_folder in classes
        for path in walk_files(class_folder)
    ]
    if not files:
        raise ValueError(f"{root} has no files in its class folders {names}")
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": [path for path, _ in files], "label": [n for _, n in files]}, features=features)


def read_flat_folder(folder: str | Path) -> Dataset:
    """List the images of a folder and of those below it, without classes; no file is opened.

    Args:
        folder: The folder; hidden files and folders are left out.

    Returns:
        One column ``image`` (undecoded ``datasets.Image``), sorted by path.

    Raises:
        ValueError: The folder does not exist or has no files.
        OSError: It cannot be listed.
    """
    root = named_folder(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    files = [path_text(path) for path in walk_files(root)]
    if not files:
        raise ValueError(f"{root} has no files")
    return Dataset.from_dict({"image": files}, features=Features({"image": Image(decode=False)}))


def read_captioned_folder(folder: str | Path, column: str = "text") -> Dataset:
    """List the images of a folder that its ``metadata.jsonl`` has a text for; no image is opened.

    Args:
        folder: It holds ``metadata.jsonl``, with a line such as ``{"file_name": "1.jpg", "text": "a cat"}`` for each
            image, as ``datasets`` reads it; names are relative to the folder.
        column: Key of the text, or of a list of texts.

    Returns:
        Columns ``image`` (undecoded ``datasets.Image``) and ``text``, in the order of the file.

    Raises:
        ValueError: There is no such folder or file, a line is none, or a text is missing.
        OSError: It cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    path = root / _CAPTIONS
    if not path.is_file():
        raise ValueError(
            f'{root} has no {_CAPTIONS} with a line such as {{"file_name": "1.jpg", "{column}": "a cat"}} an image; '
            "other ways to store pairs of images and texts are read with --dataset-name"
        )
    images, texts = list[str](), list[list[str]]()
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                name, given = _read_caption(line, column, f"{path}, line {number}")
                images.append(path_text(root / name))
                texts.append(given)
    if not images:
        raise ValueError(f"{path} is empty")
    features = Features({"image": Image(decode=False), "text": Several(Value("string"))})
    return Dataset.from_dict({"image": images, "text": texts}, features=features)


def _read_caption(line: bytes, column: str, place: str) -> tuple[str, list[str]]:
    """Name of a file and its texts."""
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON in UTF-8: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or column not in entry:
        keys = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(
            f"{place} must have the keys 'file_name' and {column!r}, found {keys!r:.200}; name the text's with "
            "--text-column-name"
        )
    given = entry[column] if isinstance(entry[column], list) else [entry[column]]
    if not given or not all(isinstance(text, str) and text.strip() for text in given):
        raise ValueError(f"{place}: {column!r} must be a text or a list of texts, found {entry[column]!r:.80}")
    name = entry["file_name"]
    try:
        "".join([name, *given]).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} has half of a surrogate pair, which is no text: {name!r:.80}") from error
    if "\0" in name or not name:
        raise ValueError(f"{place} names a file by what is no name of one: {name!r:.80}")
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise ValueError(f"{place} names a file outside of its folder, {name!r:.80}: names are relative to the folder")
    return name, given


def split_at_random(images: Dataset, share: float, seed: int, name: str | Path) -> tuple[Dataset, Dataset]:
    """A set in two parts: those to learn from, and those held out.

    Args:
        images: The set.
        share: How much of it is held out, between 0 and 1; rounded up to whole images.
        seed: Which images.
        name: What the set is called in an error.

    Raises:
        ValueError: There are too few images for two parts.
    """
    count, held_out = len(images), math.ceil(share * len(images))
    if not 0 < held_out < count:
        counted = "1 image" if count == 1 else f"{count} images"
        raise ValueError(
            f"{name} has {counted}, of which {share:.4g} are to be held out: too few for two parts, to learn from and "
            "to measure on. Add images, or give two sets"
        )
    parts = images.train_test_split(test_size=share, seed=seed)
    return parts["train"], parts["test"]
