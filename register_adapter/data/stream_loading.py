"""Data sets that are streamed, on the Hub or in a folder of parquet or webdataset shards."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Any

from datasets import ClassLabel, Dataset, Image, load_dataset

from ..utils.files import check_regular
from .checking import check_image_column, check_labels, named_errors, skip_bad
from .datasets import Data, DataArguments
from .shards import SHARD, check_shards, check_shards_of, names_shards

__all__ = ["load_stream"]

#: Images for the evaluation, where ``--max-eval-samples`` does not say how many.
_EVALUATED = 256


def load_stream(
    args: DataArguments,
    num_workers: int = 4,
    token: str | None = None,
    *,
    progress: bool = True,
    labelled: bool = True,
    texts: bool = False,
) -> Data:
    """Open the shards that ``args`` describe; of the training images nothing is read but their columns' names.

    The evaluation images are read into memory: the first of the validation or test split, or, where there is none, the
    first of the training split, which are left out there.

    Args:
        args: Where they are.
        num_workers: Number of threads that check the evaluation images.
        token: Token for the Hub; by default the one that huggingface_hub finds.
        progress: Show a bar while those are checked.
        labelled: Whether labels are needed.
        texts: Whether texts are needed.

    Raises:
        ValueError: There is no split ``train`` or no such column, or the names of the classes are not known.
        ImageFileError: Bad evaluation images and ``strict``, or not one good one.
    """
    name = str(args.dataset_name)
    check_regular(name, deep=True)
    check_shards_of(name)
    with named_errors(name):
        splits = load_dataset(name, args.dataset_config_name, token=token, streaming=True)
    if "train" not in splits:
        raise ValueError(f"{name} has no split 'train'; it has {list(splits)}")
    keys = ["image", *(["label"] if labelled else []), *(["text"] if texts else [])]
    train = _with_columns(splits["train"], args, keys)
    other = next((key for key in ("validation", "test") if key in splits), None)
    wanted = args.max_eval_samples or _EVALUATED
    source = train if other is None else _with_columns(splits[other], args, keys)
    with named_errors(name):
        held_out = list(islice(iter(source), wanted))
    check_shards({item.pop(SHARD) for item in held_out if SHARD in item})
    if other is None:
        if 0 < len(held_out) < wanted:
            raise ValueError(
                f"{name} has one split with {len(held_out)} images, and the first {wanted} are for the evaluation: "
                f"none is left to train on. Give --max-eval-samples a number below {len(held_out)}"
            )
        train = train.skip(len(held_out))
    if args.max_train_samples is not None:
        train = train.take(args.max_train_samples)
    if not held_out:
        raise ValueError(f"{name} has no images for the evaluation")
    validation = Dataset.from_list(held_out).cast_column("image", Image(decode=False))
    labels = list(train.features["label"].names) if labelled else []
    skipped: list[str] = []
    if args.verify != "none":
        decode = args.verify == "full"
        validation, skipped = skip_bad(validation, "image", decode, args.strict, num_workers, progress)
    if labelled:
        check_labels(validation, name, len(labels))
    return Data(train, validation, labels, skipped, name, name)


def _with_columns(stream: Any, args: DataArguments, keys: Collection[str]) -> Any:
    """The stream with the columns that are needed, by their usual names, and images as they are in the file."""
    columns = {"image": args.image_column_name, "label": args.label_column_name, "text": args.text_column_name}
    features = stream.features or {}
    missing = [columns[key] for key in keys if columns[key] not in features]
    if missing:
        raise ValueError(
            f"{args.dataset_name} has no columns {missing}; it has {list(features)}. Name them with "
            f"{' and '.join(f'--{key}-column-name' for key in keys)}"
        )
    check_image_column(features[columns["image"]], columns["image"], str(args.dataset_name))
    if "label" in keys and not isinstance(features[columns["label"]], ClassLabel):
        raise ValueError(
            f"column {columns['label']!r} ({features[columns['label']]}) does not name its classes, which a stream is "
            "not searched for; make it a ClassLabel, leave out --streaming, or train without labels"
        )
    renamed = {columns[key]: key for key in keys if columns[key] != key}
    shard = [SHARD] if names_shards(features) else []
    chosen = stream.select_columns([*(columns[key] for key in keys), *shard])
    # First: renaming maps the items, and images that it decodes are encoded again, a JPEG to other pixels.
    chosen = chosen.cast_column(columns["image"], Image(decode=False))
    return chosen.rename_columns(renamed) if renamed else chosen
