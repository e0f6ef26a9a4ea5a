"""Data sets of images, with or without labels: from the Hub or a folder, checked first, read one item at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Image, Value, load_dataset

from ..utils.files import check_regular
from ..utils.staging import real_path
from .augmentation import AUGMENTATIONS, Augmentation
from .checking import check_image_column, check_labels, item_name, named_errors, skip_bad
from .folders import read_captioned_folder, read_flat_folder, read_image_folder, split_at_random
from .images import image_name, load_image, refuse_word
from .processing import pixels_alone, process_image
from .processors import check_processor
from .shards import SHARD, check_shards, check_shards_of, names_shards

__all__ = [
    "Data",
    "DataArguments",
    "PixelBatches",
    "ProcessedDataset",
    "load_data",
    "skip_bad",
]

logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """Where images come from; the names are those of transformers' image classification scripts.

    Raises:
        ValueError: Neither or both of ``dataset_name`` and ``train_dir`` are given, or a value is out of range.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or a local one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of images; for classification with one sub-folder per class."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same for the evaluation."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training images held out where there is no validation set."}
    )
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the classes."})
    text_column_name: str = field(default="text", metadata={"help": "Column with the texts, for objectives on pairs."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many training images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use this many evaluation images only."})
    augmentation: str = field(
        default="none",
        metadata={
            "help": "Random changes to training images, such as crop,flip: none, or some of "
            f"{', '.join(AUGMENTATIONS)}, with commas between them."
        },
    )
    verify: Literal["full", "header", "none"] = field(
        default="full",
        metadata={"help": "Before training decode every image (full), read its header only (header), or trust it."},
    )
    strict: bool = field(
        default=False, metadata={"help": "Refuse to train if any file is bad, instead of skipping it."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data set's shards as they come; give --max-train-steps."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "With --streaming: draw the next image from so many; 1 keeps their order."}
    )

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_dir is None):
            given = "both" if self.train_dir else "neither"
            raise ValueError(f"give either --dataset-name or --train-dir, found {given}")
        if self.validation_dir and not self.train_dir:
            raise ValueError(
                "--validation-dir goes with --train-dir; a data set's own split is used with --dataset-name"
            )
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"--train-val-split must lie between 0 and 1, got {self.train_val_split}")
        if self.streaming and self.dataset_name is None:
            raise ValueError("--streaming reads shards: name a data set, or a folder of shards, with --dataset-name")
        if self.shuffle_buffer < 1:
            raise ValueError(f"--shuffle-buffer must be at least 1, got {self.shuffle_buffer}")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.verify not in ("full", "header", "none"):
            raise ValueError(f"--verify must be full, header or none, got {self.verify!r}")
        for place in (self.train_dir, self.validation_dir, self.dataset_name):
            if place == "":
                raise ValueError("the name of the images is empty; give --train-dir a folder, or --dataset-name a name")
            refuse_word(place)
        self.make_augmentation()

    def make_augmentation(self, seed: int = 0) -> Augmentation | None:
        """The augmentation of the training images, ``None`` without one.

        Raises:
            ValueError: ``augmentation`` has an unknown name.
        """
        return None if self.augmentation == "none" else Augmentation(self.augmentation, seed)


class ProcessedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Items ``{"pixel_values": (3, H, W) float32, "index": int, "epoch": int, "labels": int}`` of a data set of images.

    ``index`` is the item's number, which stays the same however the items are shuffled; ``labels`` is there where the
    data set has a label, and ``text`` where it has one; of several texts another one in each epoch.

    Args:
        dataset: A ``datasets.Dataset``, or anything with ``len`` and items ``{"image": image, "label": int}``; an
            image is whatever :func:`register_adapter.data.load_image` reads.
        image_processor: A transformers image processor.
        augmentation: Random changes to an image before it is processed; they depend on the item's number and on the
            epoch that :meth:`set_epoch` was called with. Default: none.

    Raises:
        ImageFileError: On reading an item whose image is bad.
        UnsupportedModelError: On reading an item of which the processor makes rows of patches.
        ValueError: On reading an item whose label is ``None`` or negative.
    """

    def __init__(
        self, dataset: Any, image_processor: Callable[..., Any], augmentation: Augmentation | None = None
    ) -> None:
        check_processor(image_processor)
        self.dataset, self.image_processor, self.augmentation = dataset, image_processor, augmentation
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next items belong to; augmentations and crops differ from one to the next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def name_of(self, index: int) -> str:
        """What to call an item in a message: the path of its image, if it has one."""
        return item_name(self.dataset[index]["image"], index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.processed(self.dataset[index], index)

    def processed(self, item: Any, index: int) -> dict[str, Any]:
        """An item of the data set, or of another one like it, ready for the model; ``index`` is its number."""
        labels = {}
        if "label" in item:
            label = item["label"]
            if label is None or label < 0:
                raise ValueError(f"item {index} ({image_name(item['image'])}) has no label (found {label!r})")
            labels["labels"] = int(label)
        name = item_name(item["image"], index)
        image = load_image(item["image"], name)
        if self.augmentation is not None:
            image = self.augmentation(image, self.epoch, index)
        pixels = pixels_alone(process_image(self.image_processor, image, name), self.image_processor)
        return {"pixel_values": pixels[0], "index": index, "epoch": self.epoch, **labels, **self._text_of(item)}

    def _text_of(self, item: Any) -> dict[str, Any]:
        if "text" not in item:
            return {}
        text = item["text"]
        several = isinstance(text, list | tuple) and len(text) > 0
        return {"text": text[self.epoch % len(text)] if several else text}


class PixelBatches:
    """The pixel values of a data set's items alone, in batches ``(B, 3, H, W)``, as an audit or a fit takes them.

    Args:
        dataset: Items with ``pixel_values``.
        batch_size: Images in a batch.
        limit: Use at most this many items, the first ones.
    """

    def __init__(self, dataset: Any, batch_size: int = 32, limit: int | None = None) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.count = len(dataset) if limit is None else min(limit, len(dataset))

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, self.count, self.batch_size):
            items = range(start, min(start + self.batch_size, self.count))
            yield torch.stack([self.dataset[index]["pixel_values"] for index in items])


def _class_names(dataset: Dataset, column: str) -> list[str]:
    """The class names of a label column: a ``ClassLabel``'s own, or the sorted values of strings or numbers."""
    feature = dataset.features.get(column)
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if isinstance(feature, Value):
        values = sorted(value for value in dataset.unique(column) if value is not None)
        if all(isinstance(value, str) for value in values):
            return values
        if values == list(range(len(values))):
            return [str(value) for value in values]
    raise ValueError(
        f"column {column!r} ({feature}) cannot be used as a label; the data set has {list(dataset.features)}. A label "
        "is a class label, a string, or a number from 0 without gaps; name the column with --label-column-name"
    )


def _from_hub(args: DataArguments, token: str | None, keys: Collection[str]) -> tuple[Dataset, Dataset | None]:
    """The training split, and the validation or test split if there is one: columns ``image`` and those of ``keys``."""
    assert args.dataset_name is not None
    check_regular(args.dataset_name, deep=True)
    check_shards_of(args.dataset_name)
    with PartialState().main_process_first(), named_errors(args.dataset_name):
        splits = load_dataset(args.dataset_name, args.dataset_config_name, token=token)
    if "train" not in splits:
        raise ValueError(f"{args.dataset_name} has no split 'train'; it has {list(splits)}")
    chosen = [splits[name] for name in ("train", "validation", "test") if name in splits][:2]
    columns = {"image": args.image_column_name, "label": args.label_column_name, "text": args.text_column_name}
    names = {columns[key]: key for key in ("image", *keys)}
    missing = [name for name in names if name not in chosen[0].features]
    if missing:
        raise ValueError(
            f"{args.dataset_name} has no columns {missing}; it has {list(chosen[0].features)}. Name them with "
            f"{' and '.join(f'--{key}-column-name' for key in names.values())}"
        )
    renamed = {old: new for old, new in names.items() if old != new}
    check_shards(place for split in chosen if names_shards(split.features) for place in split.unique(SHARD))
    check_image_column(chosen[0].features[args.image_column_name], args.image_column_name, args.dataset_name)
    labels = ClassLabel(names=_class_names(chosen[0], args.label_column_name)) if "label" in keys else None
    with named_errors(args.dataset_name):
        sets = [
            split.select_columns(list(names)).rename_columns(renamed).cast_column("image", Image(decode=False))
            for split in chosen
        ]
        sets = [split.cast_column("label", labels) for split in sets] if labels else sets
    for split, part in zip(chosen, sets, strict=True):
        if labels:
            check_labels(part, f"{args.dataset_name} (split {split.split})", labels.num_classes)
    return sets[0], sets[1] if len(sets) > 1 else None


def _from_folder(
    folder: str, args: DataArguments, labelled: bool, texts: bool, classes: Sequence[str] | None = None
) -> Dataset:
    """The images of a folder, with what else is needed of them."""
    if texts:
        return read_captioned_folder(folder, args.text_column_name)
    return read_image_folder(folder, classes) if labelled else read_flat_folder(folder)


def _warn_of_overlap(train: Path, validation: Path) -> None:
    """Say that what is measured on images that were trained on says nothing of others."""
    one_of, other = real_path(train), real_path(validation)
    if (one_of == other or one_of in other.parents or other in one_of.parents) and PartialState().is_main_process:
        same = "the same folder" if one_of == other else "one in the other"
        logger.warning(
            "--train-dir and --validation-dir are %s: the evaluation is of images that are trained on. Leave out "
            "--validation-dir for a part that is held out (--train-val-split)",
            same,
        )


@dataclass
class Data:
    """What :func:`load_data` returns.

    Attributes:
        train: The training images, columns ``image``, and ``label`` or ``text`` where they are needed; streamed ones
            as an ``IterableDataset``.
        validation: The evaluation images, with the same columns.
        labels: Class names in the order of their numbers, none without labels.
        skipped: A line for each file that was left out: its name and what is wrong.
        name: What the model card says about the training data.
        validation_name: What it says about the evaluation images.
    """

    train: Any
    validation: Dataset
    labels: list[str]
    skipped: list[str]
    name: str
    validation_name: str = ""


def load_data(
    args: DataArguments,
    seed: int = 0,
    num_workers: int = 4,
    token: str | None = None,
    *,
    progress: bool = True,
    labelled: bool = True,
    texts: bool = False,
) -> Data:
    """Load, split and check the images that ``args`` describe.

    Args:
        args: Where they are.
        seed: Seed of the split, where there is no validation set, and of the choice of ``max_*_samples``.
        num_workers: Number of threads that check images.
        token: Token for the Hub; by default the one that huggingface_hub finds.
        progress: Show a bar while images are checked.
        labelled: Whether labels are needed. Without, a folder is taken with all that is below it, and no label column
            is looked for.
        texts: Whether texts are needed: a column of the data set, or of ``metadata.jsonl`` in the folder.

    Raises:
        ValueError: There is no such folder, column or split, or a class of the validation set is unknown.
        ImageFileError: Bad files and ``strict``, or not one good file.
    """
    if args.train_dir is not None:
        name = real_path(args.train_dir).name
        folder, validation = args.validation_dir, None
        train = _from_folder(args.train_dir, args, labelled, texts)
        if folder:
            _warn_of_overlap(Path(args.train_dir), Path(folder))
            validation = _from_folder(
                folder, args, labelled, texts, train.features["label"].names if labelled else None
            )
        validation_name = real_path(folder).name if folder else name
    else:
        name = str(args.dataset_name)
        train, validation = _from_hub(args, token, [*(["label"] if labelled else []), *(["text"] if texts else [])])
        validation_name = name
    if len(train) < 2 and validation is None:
        raise ValueError(f"{name} has {len(train)} images; at least two are needed, one of them for the evaluation")
    if validation is None:
        # Split before checking, so that a file gone bad does not move the others between the sets.
        train, validation = split_at_random(train, args.train_val_split, seed, name)
        validation_name = f"{name}, images that were held out"
    sets: list[Dataset] = []
    skipped: list[str] = []
    for data, limit in ((train, args.max_train_samples), (validation, args.max_eval_samples)):
        if limit is not None and limit < len(data):
            data = data.shuffle(seed=seed).select(range(limit))
        if args.verify != "none":
            data, lines = skip_bad(data, "image", args.verify == "full", args.strict, num_workers, progress)
            skipped += lines
        sets.append(data)
    labels = train.features["label"].names if labelled else []
    return Data(sets[0], sets[1], labels, skipped, name, validation_name)
