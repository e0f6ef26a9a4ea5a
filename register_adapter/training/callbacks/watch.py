"""What a tracker is told at every evaluation: whether artifacts are gone, in numbers and two pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import nn

from ...artifacts import ArtifactReport, audit
from ...data.processors import normalisation_of
from ...errors import MissingExtraError, UnsupportedModelError
from ...viz import Maps, plot_before_after, read_maps
from .base import Callback

__all__ = ["WatchArtifacts"]

logger = logging.getLogger(__name__)

#: Images that are drawn.
_DRAWN = 2
_Picture = npt.NDArray[np.uint8]


class WatchArtifacts(Callback):
    """Audits the model at every evaluation, and draws two images, for the run's trackers; nothing else depends on it.

    Norms are those of patch tokens in the last block, before the final LayerNorm. The main process does it alone; where
    the weights lie on several processes (FSDP, DeepSpeed) there is nothing to see for it, and it does nothing.

    Args:
        accelerator: The run's accelerator, with its trackers.
        dataset: Items with ``pixel_values``.
        step: Says how many optimiser steps were taken.
        num_images: How many of the items are audited, the first ones.
        image_processor: Whose mean and deviation give the images their colours back.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        dataset: Any,
        step: Callable[[], int],
        num_images: int,
        image_processor: Any = None,
    ) -> None:
        self.accelerator, self.step, self._processor = accelerator, step, image_processor
        self._logged: int | None = None
        whole = accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        count = min(num_images, len(dataset)) if whole and accelerator.is_main_process else 0
        self._pixels = [dataset[index]["pixel_values"][None] for index in range(count)]
        self._before: list[Maps] = []

    def on_evaluate_begin(self, model: nn.Module) -> None:
        """Audit the model that is evaluated now, and draw it beside its base."""
        step = self.step()
        if not self._pixels or step == self._logged:
            return
        self._logged = step
        inner: Any = extract_model_from_parallel(model)
        try:
            numbers = _numbers(audit(inner, self._batches(), progress=False))
            pictures = self._draw(inner)
        except (MissingExtraError, UnsupportedModelError) as error:
            logger.warning("evaluations are logged without an audit: %s", error)
            self._pixels = []
            return
        self.accelerator.log(numbers, step=step)
        for tracker in self.accelerator.trackers:
            _log_images(tracker, pictures, step)

    def _batches(self) -> Sequence[torch.Tensor]:
        """The images in batches of one size."""
        same = len({pixels.shape for pixels in self._pixels}) == 1
        return torch.split(torch.cat(self._pixels), 16) if same else self._pixels

    def _draw(self, inner: Any) -> dict[str, _Picture]:
        """Two images, each with its norms and attention before and now: ``(1, H, W, 3)`` each."""
        device = next(inner.parameters()).device
        drawn = [pixels.to(device) for pixels in self._pixels[:_DRAWN]]
        if not self._before:
            with inner.disable_adapter():
                self._before = [read_maps("base", inner, pixels) for pixels in drawn]
        pictures = {}
        for number, pixels in enumerate(drawn):
            maps = [self._before[number], read_maps(f"step {self._logged}", inner, pixels)]
            figure = plot_before_after([self._coloured(pixels[0])], maps)
            pictures[f"artifacts_{number}"] = _rendered(figure)[None]
        return pictures

    def _coloured(self, pixels: torch.Tensor) -> _Picture:
        """``(H, W, 3)`` from what the processor has made of an image."""
        mean, deviation = normalisation_of(self._processor) or ([0.0], [1.0])
        values = pixels.float().cpu().permute(1, 2, 0).numpy() * np.asarray(deviation) + np.asarray(mean)
        image: _Picture = (values.clip(0, 1) * 255).round().astype(np.uint8)
        return image


def _log_images(tracker: Any, pictures: Mapping[str, _Picture], step: int) -> None:
    """Give a tracker images ``(1, H, W, 3)``, in the way that it takes them; some take none."""
    if hasattr(tracker, "log_images"):
        order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images(pictures, step=step, **order)
    elif tracker.name == "trackio":  # accelerate 1.15 does not hand it images
        import trackio

        tracker.log({name: trackio.Image(image) for name, (image,) in pictures.items()}, step=step)


def _numbers(report: ArtifactReport) -> dict[str, float]:
    last = report.layers[-1]
    norms = last.norms["patch"].quantiles
    gathered = report.most_gathered.gathered if report.most_gathered is not None else None
    return {
        "audit_outlier_share": last.outlier_share,
        "audit_largest_over_median": norms["1"] / max(norms["0.5"], 1e-30),
        "audit_present": float(report.verdict == "present"),
        **({"audit_attention_to_few": gathered.attention} if gathered is not None else {}),
    }


def _rendered(figure: Any) -> _Picture:
    """The pixels ``(H, W, 3)`` of a figure of matplotlib's."""
    figure.canvas.draw()
    pixels: _Picture = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    return pixels
