"""The model card of an adapter: written for the Hub, and kept up to date beside what the user wrote."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData, RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers.models.auto import modeling_auto

from ..utils.adapter_file import STRENGTH_KEY
from ..utils.files import parse_json
from ..utils.hub import WEIGHTS_NAME
from ..utils.readme import find_block, read_readme, write_readme
from .card_text import (
    OFF,
    base_name,
    body,
    is_hub_name,
    line,
    mend_trainers_card,
    named,
    plain,
    transformers_class,
)
from .config import RegisterConfig

__all__ = [
    "check_facts",
    "check_passed_on",
    "checked_metrics",
    "is_hub_name",
    "neuron_strengths",
    "update_model_card",
    "warn_of_local_base",
]

logger = logging.getLogger(__name__)

_BEGIN, _END = "<!-- register-adapter: begin", "<!-- register-adapter: end -->"
_NOTE = "generated, and replaced at the next save; write outside of these two comments"
#: What the record in the first comment holds, beside the metrics.
_RECORD = {"weights": str, "training_data": str, "evaluation_data": str, "run": dict, "license": str, "metadata": dict}
_HEAD = re.compile(rf"{_BEGIN} \([^)]*\) (?P<record>[^\r\n]*?) -->")
# Tables of transformers' Auto classes whose heads are a task of the Hub's, the more special first.
_TASKS = {
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "image-classification",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES": "zero-shot-image-classification",
    "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES": "zero-shot-object-detection",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES": "object-detection",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES": "image-segmentation",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES": "depth-estimation",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "image-text-to-text",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": "image-feature-extraction",
    "MODEL_FOR_IMAGE_MAPPING_NAMES": "image-feature-extraction",
}


def update_model_card(
    path: str | PathLike[str],
    config: RegisterConfig,
    base_class: type,
    *,
    training_data: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    license: str | None = None,
    adapter: str | None = None,
    subfolder: str | None = None,
    tags: Sequence[str] = (),
    evaluation_data: str | None = None,
    run: dict[str, Any] | None = None,
) -> None:
    """Write an adapter's README.md, or bring the generated part of an existing one up to date.

    The generated part lies between two HTML comments; text outside of them, and metadata that somebody else wrote, stay
    as they are. A README that cannot be read as a model card is left alone with a warning, so that a save never fails
    because of it.

    Args:
        path: The README.md.
        config: The adapter's config.
        base_class: Class of the base model.
        training_data: What the registers were trained on: a data set's name on the Hub, a folder, or a sentence.
            ``None`` repeats what the card says, if it was written for the same weights.
        metrics: Measured results by name, numbers of Python's, numpy's or torch's; one that is not finite is said to
            be so. ``None`` as above.
        license: Licence of the adapter as the Hub spells it, such as ``"apache-2.0"``. ``None`` keeps the card's; a
            licence is never guessed.
        adapter: Name to load the adapter by, default the folder's name.
        subfolder: Folder of the weights below the README, ``None`` for its own.
        tags: More tags for the metadata.
        evaluation_data: What ``metrics`` were measured on; ``None`` as above, or else the training data.
        run: More to say of the run, such as ``{"Training images": 400, "Steps": 100}``; ``None`` as above.

    Raises:
        OSError: The file cannot be read or written.
        TypeError, ValueError: ``metrics`` are no numbers, ``license`` is not one line, or ``tags`` are a string.
    """
    path, measured = Path(path), check_facts(metrics=metrics, license=license, tags=tags)
    card = read_readme(path)
    if card is None:
        return
    mend_trainers_card(card)
    generated = find_block(card.text, _BEGIN, _HEAD, _END)
    old = _read_record(generated[0]["record"]) if generated else {}
    training_data = named(training_data) if training_data else None
    file = path.parent / (subfolder or "") / WEIGHTS_NAME
    weights, strengths = _digest(file) or old.get("weights"), neuron_strengths(file, config)
    if weights == old.get("weights"):
        # Results describe weights: they stay in the card as long as these do.
        training_data = training_data or old.get("training_data")
        measured = measured if measured is not None else checked_metrics(old.get("metrics"))
        evaluation_data, run = evaluation_data or old.get("evaluation_data"), run or old.get("run")
    if license is not None:
        card.data["license"] = license
    adapter = adapter or path.absolute().parent.name
    evaluation_data = named(evaluation_data) if evaluation_data else None
    results = (measured, evaluation_data or training_data)
    metadata = _metadata(config, base_class, training_data, results, license or old.get("license"), adapter, tags)
    _merge(card, metadata, old.get("metadata", {}))

    record = {
        "weights": weights,
        "training_data": training_data,
        "metrics": measured,
        "evaluation_data": evaluation_data,
        "run": run,
        "license": license or old.get("license"),
        "metadata": metadata,
    }
    # An escaped ">" cannot end the comment.
    noted = json.dumps(record, default=str).replace(">", "\\u003e")
    text = body(config, base_class, training_data, measured, adapter, subfolder, evaluation_data, run, strengths)
    block = f"{_BEGIN} ({_NOTE}) {noted} -->\n\n{text}\n{_END}"
    start, end = (generated[0].start(), generated[1]) if generated else (len(card.text), len(card.text))
    if not card.text.strip():
        name = plain(base_name(config.base_model_name_or_path) or base_class.__name__)
        block = f"\n# Register tokens for {name}\n\n{block}\n"
    elif not generated:
        block = f"\n{block}\n" if card.text.endswith("\n") else f"\n\n{block}\n"
    if "\r\n" in card.text:
        block = block.replace("\n", "\r\n")
    card.text = card.text[:start] + block + card.text[end:]
    write_readme(card, path)


def check_facts(
    *, metrics: Mapping[str, Any] | None = None, license: str | None = None, tags: Any = (), **_: Any
) -> dict[str, float | None] | None:
    """What a caller wants a card to say, before anything is written or uploaded; the metrics as numbers of Python's.

    Raises:
        TypeError, ValueError: As for :func:`update_model_card`.
    """
    _check_license(license)
    if isinstance(tags, str) or not all(isinstance(tag, str) for tag in tags or ()):
        raise TypeError(f"tags must be a list of strings, got {tags!r:.100}")
    return checked_metrics(metrics)


def checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float | None] | None:
    """Measured results as numbers of Python's; ``None`` for one that is not finite, which JSON and the Hub do not have.

    Raises:
        TypeError: They are no dictionary, or one is no number.
    """
    if metrics is None:
        return None
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be a dictionary such as {{'accuracy': 0.5}}, got {metrics!r:.100}")
    checked: dict[str, float | None] = {}
    for name, given in metrics.items():
        # A scalar of numpy's or torch's, or an array of one number.
        value = given.item() if hasattr(given, "item") and np.prod(getattr(given, "shape", ())) == 1 else given
        if not isinstance(name, str) or not isinstance(value, int | float | type(None)):
            kind = type(value).__name__
            raise TypeError(f"metrics must be numbers by name, got {value!r:.100} of type {kind} for {name!r:.100}")
        checked[name] = value if value is not None and math.isfinite(value) else None
    return checked


def _check_license(license: str | None) -> None:
    """Refuse a licence that the Hub would not take.

    Raises:
        TypeError: It is not a string.
        ValueError: It is empty, or more than one line.
    """
    if license is None:
        return
    if not isinstance(license, str):
        raise TypeError(f"license must be a string such as 'apache-2.0', got {license!r:.100}")
    if not license.strip() or license != line(license):
        raise ValueError(f"license must be one line such as 'apache-2.0', got {license!r:.100}")


def check_passed_on(keywords: Iterable[str]) -> None:
    """What an upload hands on is known to saving, or to transformers' own uploads.

    Raises:
        TypeError: It is not.
    """
    known = {*inspect.signature(PeftModel.save_pretrained).parameters, "state_dict", "max_shard_size"}
    known -= {"self", "save_directory", "kwargs"}
    if unknown := sorted(set(keywords) - known):
        names = ", ".join(map(repr, unknown))
        raise TypeError(f"push_to_hub has no argument {names}; of saving it takes {', '.join(sorted(known))}")


def warn_of_local_base(configs: Mapping[str, PeftConfig]) -> None:
    """Warn of adapters, by name, whose config names a base that others cannot find."""
    for name, config in configs.items():
        if not is_hub_name(config.base_model_name_or_path):
            logger.warning(
                "the config of adapter %r names the base model %r, which is not a repository on the Hub: others "
                "cannot tell by it which model to load. Set "
                "model.peft_config[%r].base_model_name_or_path before pushing",
                name,
                config.base_model_name_or_path,
                name,
            )


def _read_record(text: str) -> dict[str, Any]:
    """What the last update wrote; nothing if somebody has edited it."""
    try:
        record = parse_json(text)
        checked_metrics(record.get("metrics"))
        whole = all(isinstance(record.get(key), kind | None) for key, kind in _RECORD.items())
        whole = whole and isinstance(record["metadata"].get("tags", []), list)
    except (ValueError, TypeError, LookupError, AttributeError):
        return {}
    return record if whole else {}


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def neuron_strengths(path: Path, config: RegisterConfig) -> list[float] | None:
    """Strengths of the register neurons in a file of weights, in 0…1; ``None`` without neurons or such a file."""
    if not config.register_neurons or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            key = next((key for key in file.keys() if key.endswith(STRENGTH_KEY)), None)  # noqa: SIM118
            return file.get_tensor(key).float().clamp(0, 1).tolist() if key else None
    except (OSError, SafetensorError):
        return None


def _metadata(
    config: RegisterConfig,
    base_class: type,
    training_data: str | None,
    measured: tuple[Mapping[str, float | None] | None, str | None],
    license: str | None,
    adapter: str,
    tags: Sequence[str],
) -> dict[str, Any]:
    """The card's metadata, JSON-ready."""
    base, family = config.base_model_name_or_path, config.identity.family if config.identity else None
    # A local path is not a model on the Hub: it is refused as base_model there, and tells others about this machine.
    on_hub = base if is_hub_name(base) else None
    task = _pipeline_tag(base_class)
    names = ["register-tokens", "vision-transformer", "peft", "register-adapter"]
    if transformers_class(base_class):
        names.append("transformers")
    names += [line(family)] if family else []
    names += [f"base_model:adapter:{on_hub}"] if on_hub else []
    data = ModelCardData(
        base_model=on_hub,
        # "peft", not a name of our own: the files are PEFT's (adapter_config.json), and the Hub knows that library and
        # lists it under Adapters. The relation below says the same to the base's model tree.
        library_name="peft",
        license=license,
        pipeline_tag=task,
        tags=[*names, *map(line, tags)],
        datasets=[training_data] if training_data and is_hub_name(training_data) else None,
    )
    values: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    if on_hub:
        values["base_model_relation"] = "adapter"
    metrics, evaluation_data = measured
    # The baseline is not a result of this adapter.
    finite = {k: value for k, value in (metrics or {}).items() if value is not None and not k.startswith(OFF)}
    # The Hub wants to know what a result was measured on; without that it stays in the text alone.
    if finite and evaluation_data:
        values["metrics"] = [_metric(name) for name in finite]
        values["model-index"] = _model_index(finite, evaluation_data, task, adapter)
    return values


def _model_index(metrics: dict[str, float], measured_on: str, task: str | None, adapter: str) -> list[dict[str, Any]]:
    results = [
        EvalResult(
            task_type=task or "image-feature-extraction",
            dataset_type=measured_on if is_hub_name(measured_on) else "custom",
            dataset_name=measured_on,
            metric_type=_metric(name),
            metric_value=float(value),
            metric_name=line(name),
        )
        for name, value in metrics.items()
    ]
    index: list[dict[str, Any]] = eval_results_to_model_index(line(adapter.rpartition("/")[2]), results)
    return index


def _metric(name: str) -> str:
    return line(name.removeprefix("eval_"))


def _merge(card: RepoCard, ours: dict[str, Any], before: dict[str, Any]) -> None:
    """Bring our metadata up to date; a value that differs from what was written ``before`` is the user's and stays."""
    for key in dict.fromkeys([*ours, *before]):
        value = card.data.get(key)
        if key == "tags":
            given = [value] if isinstance(value, str) else list(value or [])
            theirs = [tag for tag in given if tag not in before.get("tags", [])]
            card.data["tags"] = list(dict.fromkeys([*theirs, *ours.get("tags", [])]))
        elif value is None or value == before.get(key):
            card.data[key] = ours.get(key)


def _pipeline_tag(base_class: type) -> str | None:
    """The Hub's name of the base model's task, where transformers' own tables tell it."""
    kind = transformers_class(base_class)
    for table, task in _TASKS.items() if kind else ():
        for names in getattr(modeling_auto, table, {}).values():
            if kind and kind.__name__ in ((names,) if isinstance(names, str) else names):
                return task
    if kind and kind.__name__.endswith(("VisionModel", "VisionModelWithProjection")):
        return "image-feature-extraction"
    return None
