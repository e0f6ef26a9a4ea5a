"""Zero-shot classification by models that embed images and texts: CLIP, SigLIP and their relatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...data.texts import TextTokenizer, check_tokens
from ...errors import UnsupportedModelError
from ...features.finite import check_finite_features, subject_in_words
from ...features.passes import PassOptions, open_pass
from ...features.subjects import Subjects, keeping_adapters, looking_at, named_subjects
from ...utils.files import parse_json, read_text
from .classifying import ACCURACY, reading_of, settings_of
from .reading import Reading, describe
from .results import TaskReport, compare_means
from .samples import LabelledImages, label_images, name_of

__all__ = ["TEMPLATES", "evaluate_zero_shot", "read_classes", "read_templates"]

#: The seven templates that the authors of CLIP chose for ImageNet out of their eighty.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
#: Texts in one pass of the text tower.
_TEXTS = 64
Classes = Mapping[str, str | Sequence[str]]


@keeping_adapters
def evaluate_zero_shot(
    models: Subjects,
    test: Any,
    classes: Classes | Sequence[str] | None = None,
    *,
    templates: Sequence[str] = TEMPLATES,
    tokenizer: Callable[[Sequence[str]], Any] | None = None,
    image_processor: Any = None,
    batch_size: int = 32,
    num_workers: int = 2,
    strict: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> TaskReport:
    """Top-1 accuracy without any training: an image is of the class whose texts its embedding is nearest to.

    A class's embedding is the mean, of length 1, of the embeddings, of length 1, of its names in all templates.

    Args:
        models: See :func:`~register_adapter.evaluation.evaluate_knn`; models of transformers with an image and a text
            tower, or of OpenCLIP.
        test: Labelled images, see :func:`~register_adapter.evaluation.evaluate_knn`.
        classes: From the class of the images (a folder's name) to the name or the names that texts say; or names in the
            order of the labels. Classes of no image are candidates too. ``None``: the images' own classes, with spaces
            for underscores.
        templates: Texts with ``{}`` where the name goes.
        tokenizer: From texts to the text tower's keywords (a tensor for OpenCLIP); ``None`` looks up the model's own,
            which OpenCLIP's models do not say.
        image_processor: Of transformers, or a function from a PIL image to ``(3, H, W)``; ``None`` looks up the
            model's own.
        batch_size: Images in one pass.
        num_workers: Threads that read images.
        strict: Refuse bad images instead of skipping them with a warning.
        seed: Seed of the bootstrap.
        progress: Show progress bars.

    Raises:
        ValueError: There are no images, fewer than two classes, a class of the images has no name, a template has no
            ``{}``, or there is no tokenizer.
        ImageFileError: No image is good, or one is bad and may not be.
        UnsupportedModelError: The model does not embed images and texts.

    Example:
        >>> evaluate_zero_shot(clip, "imagenet/val", {"n01440764": "tench", "n02102040": ["English springer", "dog"]})
    """
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"every template needs one {{}} for the name of a class, got {list(templates)!r:.200}")
    reading = reading_of(image_processor, batch_size, num_workers, strict, progress, False, None)
    subjects = named_subjects(models)
    for subject in subjects.values():
        _check(subject[0] if isinstance(subject, tuple) else subject)
    data, names = _named(label_images(test), classes)
    # Replaced and not formatted: what else is in braces is text of the prompt.
    texts = [
        [template.replace("{}", name) for name in of_class for template in templates] for of_class in names.values()
    ]
    setting = f"{len(templates)} template{'' if len(templates) == 1 else 's'}"
    hits, numbers = {}, []
    for name, subject in subjects.items():
        with looking_at(subject) as model:
            weights = _classes(model, texts, tokenizer, reading, name)
            said, read = [], []
            for some, embeds in _images(model, data, reading, f"{name}: images"):
                said += (embeds @ weights.T).argmax(1).tolist()
                read += some
        numbers.append(read)
        hits[name, setting] = np.array(said) == data.labels[read]
    if any(read != numbers[0] for read in numbers):
        raise ValueError("the models could read different images; give one image_processor, or strict=True")
    settings = {
        "templates": list(templates),
        "classes": {key: list(of_class) for key, of_class in names.items()},
        "embedding": "the model's own image and text embeddings, cosine",
        **settings_of(reading, seed),
    }
    left_out = sorted(set(range(len(data))) - set(numbers[0]))
    return TaskReport(
        "zero-shot",
        ACCURACY,
        compare_means(hits, {key: {"templates": len(templates), "classes": len(names)} for key in hits}, seed),
        0,
        len(numbers[0]),
        settings,
        {name: describe(subject) for name, subject in subjects.items()},
        tuple(name_of(data.images[number], number) for number in left_out),
    )


def read_classes(path: str | Path) -> dict[str, list[str]] | list[str]:
    """Names of classes from a JSON file: a mapping from classes to a name or several, or a list of names.

    Raises:
        ValueError: It holds something else.
        OSError: It cannot be read.
    """
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(content, list) and all(isinstance(name, str) and name.strip() for name in content):
        return content
    if isinstance(content, dict):
        several = {key: [given] if isinstance(given, str) else given for key, given in content.items()}
        if all(
            isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names)
            for names in several.values()
        ):
            return several
    raise ValueError(
        f'{path} must be a mapping from classes to names, such as {{"n01440764": "tench"}}, or a list of names in the '
        "order of the classes"
    )


def read_templates(path: str | Path) -> list[str]:
    """Templates from a text file, one a line, or a JSON list.

    Raises:
        ValueError: It holds something else.
        OSError: It cannot be read.
    """
    text = read_text(path)
    lines: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if Path(path).suffix.lower() == ".json":
        try:
            lines = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(lines, list) or not lines or any(not isinstance(line, str) for line in lines):
        raise ValueError(f"{path} must hold templates such as 'a photo of a {{}}.', one a line or as a JSON list")
    return lines


def _named(
    data: LabelledImages, classes: Classes | Sequence[str] | None
) -> tuple[LabelledImages, dict[str, Sequence[str]]]:
    """The images with their labels among the candidates, and the names of every candidate."""
    if isinstance(classes, Mapping):
        lacking = [name for number, name in enumerate(data.classes) if name not in classes and number in data.labels]
        if lacking:
            raise ValueError(f"classes names none of {', '.join(lacking[:5])}, which images are of")
        keys = list(classes)
        places = np.array([keys.index(name) if name in classes else -1 for name in data.classes])
        data = LabelledImages(data.images, places[data.labels], tuple(keys))
        names = {key: [given] if isinstance(given, str) else list(given) for key, given in classes.items()}
    else:
        words = [name.replace("_", " ") for name in data.classes] if classes is None else list(classes)
        if len(words) < len(data.classes) or isinstance(classes, str):
            raise ValueError(f"classes has {len(words)} names, and images are of {len(data.classes)} classes")
        keys = [*data.classes, *words[len(data.classes) :]]
        if len(set(keys)) < len(keys):
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise ValueError(
                f"classes has names beyond the images' {len(data.classes)} classes, among them {twice!r:.200}, which "
                "another class is called too; give a mapping from classes to names"
            )
        names = {key: [word] for key, word in zip(keys, words, strict=True)}
    if len(names) < 2:
        raise ValueError(f"there must be at least two classes to choose from, found {list(names)}")
    return data, names  # type: ignore[return-value]


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check(model: nn.Module) -> None:
    base = _base(model)
    config = getattr(base, "config", None)
    both = all(hasattr(config, f"{kind}_config") for kind in ("text", "vision")) and hasattr(base, "logit_scale")
    if not both and not _is_open_clip(base):
        raise UnsupportedModelError(
            f"{type(base).__name__} does not embed images and texts in one space, which zero-shot classification "
            "needs; give a model such as CLIPModel or SiglipModel"
        )


def _is_open_clip(base: Any) -> bool:
    return hasattr(base, "encode_image") and hasattr(base, "encode_text")


def _classes(model: Any, texts: list[list[str]], tokenizer: Any, reading: Reading, name: str) -> torch.Tensor:
    """``(C, E)`` embeddings of length 1."""
    base = _base(model)
    every = [text for of_class in texts for text in of_class]
    device = next(model.parameters()).device
    if tokenizer is None and _is_open_clip(base):
        raise ValueError(f"{type(base).__name__} does not say which tokenizer is its: give tokenizer=")
    tokenize = tokenizer or TextTokenizer.of(base)
    embeds, words = [], _vocabulary(base)
    starts = range(0, len(every), _TEXTS)
    for start in tqdm(starts, desc=f"{name}: texts", disable=not reading.progress):
        tokens: Any = tokenize(every[start : start + _TEXTS])
        ids = tokens if isinstance(tokens, torch.Tensor) else tokens.get("input_ids")
        if words is not None and ids is not None:
            check_tokens(ids, words)
        if _is_open_clip(base):
            made = base.encode_text(tokens.to(device))
        else:
            made = _text_embeds(base, {key: value.to(device) for key, value in tokens.items()})
        check_finite_features({"text embeddings": made}, subject_in_words(model), unit="text", title=name)
        embeds.append(F.normalize(made.float(), dim=-1))
    groups = torch.split(torch.cat(embeds), [len(of_class) for of_class in texts])
    return F.normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)


def _vocabulary(base: Any) -> int | None:
    """How many tokens the text tower knows, if the model says so."""
    said = getattr(getattr(getattr(base, "config", None), "text_config", None), "vocab_size", None)
    for part in (base, getattr(base, "text", None)):  # OpenCLIP's
        said = getattr(part, "vocab_size", None) if said is None else said
    return said if isinstance(said, int) else None


def _text_embeds(base: Any, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
    made = base.get_text_features(**tokens)
    return made if isinstance(made, torch.Tensor) else made.pooler_output  # transformers 5 gives an output


def _images(model: Any, data: LabelledImages, reading: Reading, title: str) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Numbers of images, and their embeddings ``(B, E)`` of length 1."""
    base = _base(model)
    options = PassOptions(
        reading.image_processor,
        reading.batch_size,
        num_workers=reading.num_workers,
        strict=reading.strict,
        progress=reading.progress,
    )
    opened = open_pass(model, data.images, options, title=title)
    with closing(opened), opened.attached():
        for batch in opened:
            inputs = batch.inputs if isinstance(batch.inputs, Mapping) else {"pixel_values": batch.inputs}
            if _is_open_clip(base):
                made = base.encode_image(inputs["pixel_values"])
            else:  # the whole model, as in use: two tokens whose embedding nobody reads
                tokens = torch.zeros(1, 2, dtype=torch.long, device=opened.device)
                made = model(input_ids=tokens, **inputs).image_embeds
            check_finite_features({"image embeddings": made}, subject_in_words(model), title=title)
            yield list(batch.numbers), F.normalize(made.float(), dim=-1)
