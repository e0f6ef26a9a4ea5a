"""Do outlying tokens hold local or global information? Linear probes, as in "Vision Transformers Need Registers".

The paper (arXiv 2309.16588, section 2.1, table 1 and figure 5b) asks three things of a token: where it stands, what its
patch looks like, and what the whole image shows. Outliers of DINOv2-g know little of the first two and much of the
third: position top-1 41.7 (normal) and 22.8 (outlier), distance 0.79 and 5.09 patches, pixel error 18.4 and 25.2;
accuracy on Aircraft with one token 17.1 and 79.1, with CLS 87.3.

The paper leaves open whether position and pixels are learned from all patch tokens together or from each kind apart.
Here each kind has a probe of its own (``local_probe="own"``), from as many tokens of the same images: what is measured
is then what the tokens hold, not how unlike the others they are. ``"shared"`` learns one probe from all patch tokens in
their natural proportion. Classes are always learned kind by kind, from one random token an image, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from ...artifacts.rules.threshold import Threshold
from ...features.layout import adapters_stay, tower_of
from ...features.passes import PassOptions, open_pass, resolve_layer
from ...features.subjects import keeping_adapters
from ...towers.anatomy import Anatomy
from ...utils.environment import versions
from .fitting import LOCAL, Probing, Task
from .report import ProbeReport
from .samples import TokenSampler

__all__ = ["probe_tokens"]

#: Fewest images that anything is fitted on.
_FEWEST = 10

DEFINITIONS = {
    "tokens": "states of one layer, before the final LayerNorm, each feature scaled to mean 0 and variance 1",
    "outlier": "patch tokens whose L2 norm lies beyond the threshold",
    "images": "normal and outlying tokens are drawn from the same images, those with both, as many of each; CLS and "
    "registers are read in the same images. Without enough outliers all images are used",
    "position_top1": "multinomial logistic regression over all places of the grid; share of hits",
    "position_distance": "Euclidean distance between the found and the true place, in patches",
    "reconstruction_l2": "ridge regression to the pixel values that the patch is embedded from, as the model is given "
    "them (normalised); L2 norm of the error over all values of a patch",
    "classification": "multinomial logistic regression from one random token an image (CLS and registers: that token)",
    "error": "standard error over images",
    "constant": "in brackets: the best guess that does not look at the token",
}


@keeping_adapters
def probe_tokens(
    model: nn.Module,
    images: Any,
    labels: Sequence[int] | None = None,
    *,
    image_processor: Any = None,
    threshold: Threshold | None = None,
    layer: int = -1,
    tasks: Sequence[Task] | None = None,
    local_probe: Literal["own", "shared"] = "own",
    tokens_per_image: int = 4,
    min_images: int = 100,
    max_samples: int = 10_000,
    test_share: float = 0.3,
    max_iter: int = 300,
    seed: int = 0,
    batch_size: int = 32,
    max_images: int | None = None,
    progress: bool = False,
    strict: bool = False,
    num_workers: int = 2,
    target_modules: str | None = None,
    anatomy: Anatomy | None = None,
) -> ProbeReport:
    """What normal patches, outliers, CLS and registers of a model know, by linear probes on held-out images.

    Images stream through; of each only a few tokens are kept. Penalties are chosen by
    cross-validation over the training images; the test uses other images.

    Args:
        model: A base model or one with registers; it runs in ``eval()`` mode and is left as it was.
        images: As for :func:`~register_adapter.artifacts.audit`. Labels may come with them: under ``"label"`` in the
            items of a data set, under ``"labels"`` in ready batches, or as the second of a pair ``(inputs, labels)``.
        labels: Number of the class of every image, bad images included, in their order, if they come apart.
        image_processor: As for the audit.
        threshold: Which patch tokens are outliers. Choose it on other images. ``None``: there are no outliers.
        layer: Index into ``hidden_states``: 0 is the input of the first block, -1 the output of the last, before the
            final LayerNorm. The threshold must be for the same layer.
        tasks: ``"position"``, ``"reconstruction"``, ``"classification"``; ``None`` for all that the inputs allow.
        local_probe: See the module's docstring.
        tokens_per_image: Patch tokens of each kind that position and pixels are learned from, at most.
        min_images: Images with outliers that are needed to say something about outliers.
        max_samples: Images with outliers whose tokens are kept, at most, and as many without; a uniform sample if there
            are more. Memory is about ``max_samples * tokens_per_image * 2 * (D + pixels of a patch) * 4`` bytes.
        test_share: Share of the images for the test.
        max_iter: Iterations of the logistic regressions, at most.
        seed: Seed of draws and splits; the same seed gives the same report on a CPU.
        batch_size: As for the audit, as are all below.
        max_images: Use at most this many images, the first ones.
        progress: Show a bar.
        strict: Refuse bad images instead of skipping them with a warning.
        num_workers: Threads that read images.
        target_modules: Name of the vision tower, where there are several.
        anatomy: Description of a model that the table does not have.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        UnsupportedModelError: No vision tower; or places of the patches are not known, and a local task is asked for.
        ImageFileError: ``strict`` and an image is bad, or none is good.
        ValueError: Too few images, labels of one class, an unknown task, or classification without labels.
    """
    tower, registers = tower_of(model, target_modules, anatomy)
    index = resolve_layer(tower, layer)
    if unknown := set(tasks or ()) - {*LOCAL, "classification"}:
        raise ValueError(f"unknown tasks {sorted(unknown)}; there are position, reconstruction, classification")
    if local_probe not in ("own", "shared"):
        raise ValueError(f"local_probe must be 'own' or 'shared', got {local_probe!r}")
    if tokens_per_image < 1 or min_images < _FEWEST or max_samples < min_images or not 0 < test_share < 1:
        raise ValueError(
            f"tokens_per_image={tokens_per_image} must be at least 1, min_images={min_images} at least {_FEWEST}, "
            f"max_samples={max_samples} at least min_images, test_share={test_share} between 0 and 1"
        )
    places = tasks is None or bool(set(tasks) & set(LOCAL))
    options = PassOptions(
        image_processor=image_processor,
        batch_size=batch_size,
        max_images=max_images,
        num_workers=num_workers,
        strict=strict,
        progress=progress,
    )
    opened = open_pass(
        model,
        images,
        options,
        labels=labels,
        with_labels=True,
        target_modules=target_modules,
        anatomy=anatomy,
        title="probes",
    )
    with adapters_stay(registers):  # the sampler counts the tokens before the patches once, for all passes
        sampler = TokenSampler(tower, registers, threshold, index, places, tokens_per_image, max_samples, seed)
        opened.run(sampler)
    samples = sampler.samples()
    enough = len(samples.with_both) >= min_images
    drawn = samples.with_both if enough else samples.with_both + samples.plain
    drawn = sorted(drawn, key=lambda image: image.image)
    if len(drawn) < _FEWEST:
        raise ValueError(f"probes need at least {_FEWEST} images with normal patches, found {len(drawn)}")
    labelled = all(image.label is not None for image in drawn)
    if tasks is not None and "classification" in tasks and not labelled:
        raise ValueError("classification needs labels: give labels=, or batches with a 'labels' entry")
    wanted = tasks if tasks is not None else (*LOCAL, "classification") if labelled else LOCAL
    rows, difference = Probing(drawn, samples, wanted, test_share, max_iter, seed).rows(enough, min_images, local_probe)
    return ProbeReport(
        rows=rows,
        difference=difference,
        layer=index,
        num_layers=len(tower.part("blocks")) + 1,
        family=tower.anatomy.family,
        threshold=threshold,
        grid=samples.grid,
        num_images=samples.num_images,
        num_patches=samples.num_patches,
        num_outliers=samples.num_outliers,
        num_images_with_outliers=samples.num_images_with_both,
        local_probe=local_probe,
        seed=seed,
        skipped=opened.skipped,
        definitions=DEFINITIONS,
        versions=versions(),
    )
