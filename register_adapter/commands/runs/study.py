"""A study of a model by its name, with the task that is known of what the package ships and of class folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ...studies import ARMS, Accuracy, MosaicError, StudyResult, Task, study
from ...testbed import MosaicDataset, SceneDataset
from ...testbed.grown import RECIPES, load_grown
from ...utils.shipped import CLEAN, GROWN, GROWN_TILES, PLANTED, full_name
from ...utils.staging import check_target
from .inputs import choose_device, load_base, load_images, load_processor
from .open_clip_models import is_open_clip

__all__ = ["StudyArguments", "run_study"]

#: Images, where nobody says how many.
_IMAGES = 512
#: Grown models, and the task that each grew on.
_GREW_ON = {GROWN: "mosaics", GROWN_TILES: "tiles"}


@dataclass(frozen=True)
class StudyArguments:
    """What to study; see :func:`register_adapter.studies.study` for all but these.

    Attributes:
        model: Name or folder of a model of transformers, or a word for what is packaged, such as ``"grown"``.
        images: Folder of images; ``"scenes"``, ``"mosaics"`` or ``"tiles"`` for images that the package draws.
        output_dir: Folder for what is made.
        training: Make the arms that are trained, too.
        device: Where to run; default: a GPU if there is one.
    """

    model: str
    images: str
    output_dir: str
    steps: int = 60
    seed: int = 0
    seeds: int = 1
    arms: Sequence[str] | None = None
    training: bool = True
    rule: str = "auto"
    max_images: int = _IMAGES
    batch_size: int = 16
    device: str | None = None
    strict: bool = False
    progress: bool = True


def run_study(args: StudyArguments) -> StudyResult:
    """Study a model, and write what comes out.

    Raises:
        ValueError, OSError, RegisterAdapterError: As for loading, and for the study.
    """
    check_target(args.output_dir)
    if is_open_clip(args.model):
        raise ValueError(
            f"{args.model} is OpenCLIP's, which cannot be trained here; `register-adapter audit` and `fit` take it"
        )
    images = load_images(args.images, args.max_images)
    model = load_base(args.model).to(choose_device(args.device))
    return study(
        model,
        images if isinstance(images, list) else list(images),
        args.output_dir,
        image_processor=load_processor(args.model),
        task=_task(args.model, model, images),
        steps=args.steps,
        seed=args.seed,
        seeds=args.seeds,
        arms=args.arms if args.training else _untrained(args.arms),
        rule=args.rule,
        max_images=args.max_images,
        batch_size=args.batch_size,
        strict=args.strict,
        progress=args.progress,
        model_name=args.model,
        images_name=args.images,
    )


def _untrained(arms: Sequence[str] | None) -> list[str]:
    """Names of the arms in which nothing is trained, of those that are wanted.

    Raises:
        ValueError: One that was asked for by name is trained.
    """
    trained = {arm.name for arm in ARMS if arm.objective is not None}
    if asked := [name for name in arms or () if name in trained]:
        raise ValueError(f"the arm {asked[0]!r} is trained, and --no-training makes no such arm: leave out one of them")
    return [name for name in (arms or [arm.name for arm in ARMS]) if name not in trained]


def _task(name: str, model: nn.Module, images: Any) -> Task | None:
    """What the model is for, where that can be told: a packaged one, or a classifier and a folder of its classes."""
    word = full_name(name)
    if word in _GREW_ON and isinstance(images, MosaicDataset):
        same = images.task == RECIPES[_GREW_ON[word]].task
        return MosaicError(load_grown(_GREW_ON[word]).head, images) if same else None
    if word in (CLEAN, PLANTED) and isinstance(images, SceneDataset):
        return Accuracy([item["label"] for item in images])
    known: dict[str, int] = getattr(getattr(model, "config", None), "label2id", None) or {}
    classes = {_plain(label): int(index) for label, index in known.items()}
    if (
        not isinstance(images, list)
        or type(model).__name__ not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    ):
        return None
    folders = [_plain(Path(path).parent.name) for path in images]
    if len(set(folders)) < 2 or not set(folders) <= set(classes):
        return None
    return Accuracy([classes[folder] for folder in folders])


def _plain(label: Any) -> str:
    """A class by its name, however a folder writes it."""
    return " ".join(str(label).replace("_", " ").lower().split())
