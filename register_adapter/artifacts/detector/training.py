"""Training a detector on one model's attention: read attention values, hide patches, predict them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from ...features.subjects import keeping_adapters
from ..rules.rules import Rule, apply_rule, rule_name
from .config import DetectorConfig
from .features import attention_features, shape_of_attention
from .model import AttentionDetector
from .template import fit_template

__all__ = ["calibrate", "train_detector"]

logger = logging.getLogger(__name__)


@keeping_adapters
def train_detector(
    model: nn.Module,
    images: Any,
    *,
    image_processor: Any = None,
    max_images: int | None = 512,
    num_steps: int = 500,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    mask_ratio: float = 0.25,
    held_out: float = 0.2,
    rule: str | Rule = "auto",
    max_gib: float = 4.0,
    width: int = 0,
    depth: int = 3,
    mixed_precision: str | None = None,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AttentionDetector:
    """Train a detector for a model, on images without labels.

    Every step hides a random quarter of the patches of a batch, turned and mirrored at random, and fits the Student-t
    likelihood of what they get and give. Attention values are read once and kept in float16. Afterwards the most
    surprising patches are compared (see :func:`fit_template`), and the threshold is set.

    Args:
        model: The model whose patches shall be scored; it is left as it is.
        images: Images of one size, or batches, see :func:`register_adapter.artifacts.audit`. A few hundred are
            enough; artifacts among them are to be expected and do no harm.
        image_processor: As for the audit.
        max_images: Use at most this many images, the first ones.
        num_steps: Steps of AdamW, with a linear warm-up over a tenth of them and a cosine decay.
        batch_size: Images per step and process.
        learning_rate: The highest.
        mask_ratio: Share of the patches that are hidden.
        held_out: Share of the images, the last ones, that are not trained on; they confirm the template and set the
            threshold.
        rule: Says whether there are two kinds of patches, and draws the threshold: a name out of
            :data:`register_adapter.artifacts.rules.RULES`, or such a function.
        max_gib: Reading stops, with a warning, when attention values take this much memory.
        width: See :class:`DetectorConfig`; 0 has it chosen.
        depth: See :class:`DetectorConfig`.
        mixed_precision: ``"no"`` or ``"bf16"``, for the network of the detector; default: as Accelerate is set up.
        accelerator: By default a new one.
        seed: Seed of everything random; a run on a CPU repeats bit for bit.
        progress: Show progress bars with the time left.

    Returns:
        The detector, on the CPU, in evaluation mode.

    Raises:
        ValueError: There are too few images, they differ in size, or a number is out of range.
        UnsupportedModelError: See :func:`register_adapter.artifacts.detector.attention_features`.
        FloatingPointError: The loss is not finite.
    """
    if num_steps < 1 or batch_size < 1:
        raise ValueError(f"num_steps and batch_size must be at least 1, got {num_steps} and {batch_size}")
    if not 0 < mask_ratio < 1 or not 0 < held_out < 1:
        raise ValueError(f"mask_ratio and held_out must lie between 0 and 1, got {mask_ratio} and {held_out}")
    accelerator = accelerator or Accelerator(mixed_precision=mixed_precision)
    shown = progress and accelerator.is_local_main_process
    stream = attention_features(model, images, image_processor=image_processor, max_images=max_images, progress=shown)
    features = _keep(stream, max_gib)
    rest = round(len(features) * held_out)
    if rest < 1 or len(features) - rest < 1:
        raise ValueError(f"{len(features)} images are too few to train on and to hold {held_out:.0%} of them out")
    train, calibration = features[:-rest], features[-rest:]
    _, kinds = shape_of_attention(model)
    blocks, heads = features.shape[3:5]
    config = DetectorConfig(int(blocks), int(heads), kinds, width=width, depth=depth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = AttentionDetector(config)
    _fit_standardisation(detector, train)
    _fit(detector, train, accelerator, num_steps, batch_size, learning_rate, mask_ratio, seed, shown)
    detector = accelerator.unwrap_model(detector, keep_fp32_wrapper=False).eval()
    fit_template(detector, train, calibration, rule)
    scores = torch.cat([detector.score_features(part).cpu() for part in torch.split(calibration, batch_size)])
    return calibrate(detector.cpu(), scores, rule)


def calibrate(detector: AttentionDetector, scores: torch.Tensor, rule: str | Rule = "auto") -> AttentionDetector:
    """Set the threshold of a detector from scores of images that it was not trained on; nobody labels them.

    Args:
        detector: Changed in place.
        scores: Any shape, of :meth:`AttentionDetector.score`.
        rule: As in :func:`train_detector`. Its upper limit is the threshold; infinity if there is one kind of patch.

    Returns:
        The same detector.
    """
    drawn = apply_rule(rule, scores)
    threshold = drawn.high if drawn.separated else float("inf")
    detector.config = replace(detector.config, threshold=threshold, rule=f"{rule_name(rule)}: {drawn.reason}")
    return detector


def _keep(stream: Iterable[torch.Tensor], max_gib: float) -> torch.Tensor:
    """``(M, h, w, L, H, K)`` float16 on the CPU."""
    parts: list[torch.Tensor] = []
    size = 0
    for features in stream:
        if parts and features.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"images of different sizes: grids of {tuple(parts[0].shape[1:3])} and {tuple(features.shape[1:3])} "
                "patches; resize them to one"
            )
        parts.append(features.half().cpu())
        size += parts[-1].nbytes
        if size > max_gib * 2**30:
            logger.warning(
                "stopped after %d images: their attention values take %.2g GiB", sum(map(len, parts)), max_gib
            )
            break
    return torch.cat(parts)


def _fit_standardisation(detector: AttentionDetector, features: torch.Tensor) -> None:
    """Median and root mean square distance from it, a value of each block, head and kind."""
    flat = features.flatten(3).flatten(0, 2)
    # A subset is enough, and a median of hundreds of millions of values is not cheap.
    flat = flat[:: max(len(flat) // 50_000, 1)].float()
    center = flat.median(0).values
    detector.center.copy_(center)
    detector.spread.copy_((flat - center).square().mean(0).sqrt().clamp_min(0.05))


def _fit(
    detector: AttentionDetector,
    features: torch.Tensor,
    accelerator: Accelerator,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    mask_ratio: float,
    seed: int,
    shown: bool,
) -> None:
    """The training loop."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(features), batch_size, shuffle=True, generator=order)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=learning_rate, weight_decay=0.01)
    prepared, optimizer, loader = accelerator.prepare(detector, optimizer, loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        getattr(optimizer, "optimizer", optimizer), learning_rate, num_steps, pct_start=0.1, cycle_momentum=False
    )
    # Each process hides other patches.
    random = torch.Generator().manual_seed(seed + 1 + accelerator.process_index)
    prepared.train()
    with tqdm(total=num_steps, desc="training the detector", unit="step", disable=not shown) as bar:
        for batch, _ in zip(_endless(loader), range(num_steps), strict=False):
            values = _turned(detector.standardise(batch), random)
            hidden = (torch.rand(values.shape[:3], generator=random) < mask_ratio).to(values.device)
            location, log_scale = prepared(values, hidden)
            loss = detector.loss(values, hidden, location, log_scale)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if bar.n % 50 == 0 or bar.n == num_steps:
                value = loss.item()
                if value != value or abs(value) == float("inf"):
                    raise FloatingPointError(f"the loss is {value} at step {bar.n}; try a lower learning_rate")
                bar.set_postfix_str(f"loss {value:.3f}")


def _endless(loader: Any) -> Iterator[torch.Tensor]:
    epoch = 0
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        for (batch,) in loader:
            yield batch
        epoch += 1


def _turned(values: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """One of the eight turns and reflections of the grid ``(B, h, w, C)``; the neighbourhood has no preferred side."""
    mirrored, upside_down, swapped = (torch.rand(3, generator=random) < 0.5).tolist()
    values = values.flip(2) if mirrored else values
    values = values.flip(1) if upside_down else values
    return values.transpose(1, 2) if swapped else values
