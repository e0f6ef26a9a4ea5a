"""A detector that learns from attention alone which patches are out of place; no norm, no label.

It was asked for in the discussion of "Vision Transformers Need Registers" (arXiv 2309.16588). What a patch gets and
gives in every block and head is a vector. A small convolutional network predicts that vector from those of the
neighbours, as in masked modelling ("Masked Autoencoders", arXiv 2111.06377), and how uncertain each value is. A patch
on an object is much attended to, and so are its neighbours: that can be predicted. A patch of background that draws
attention to itself cannot, and that is an artifact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...errors import UnsupportedModelError
from ...features.subjects import keeping_adapters
from .config import DetectorConfig
from .features import attention_features
from .file import read_config, read_weights, write_detector

__all__ = ["AttentionDetector", "along", "lifted"]

# Beyond this many of its usual deviations a value says nothing more; beyond this many of the predicted ones neither.
_CLIP, _MAX_SURPRISE = 20.0, 6.0


def along(surprise: torch.Tensor, typical: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
    """How far bounded surprises ``(..., C)`` go the way of a template ``(C,)`` from what is typical, 1 at the least."""
    return lifted((surprise - typical) @ template)


def lifted(way: torch.Tensor) -> torch.Tensor:
    """``(1 + way²)½``, 1 for what goes the other way.

    Rules look at logarithms, where values around 0 would be outliers of their own; so the least is 1, reached smoothly.
    """
    return (1 + way.clamp_min(0).square()).sqrt()


class AttentionDetector(nn.Module):
    """A network that predicts hidden attention values from visible neighbours, and scores patches by its surprise.

    It knows no absolute place: artifacts that return to the same place would be learned by it. Beyond the border
    patches are marked as absent. Its template, if it has one, is what artifacts have in common, see
    :func:`register_adapter.artifacts.detector.template.fit_template`.

    Args:
        config: Its shape; see :class:`DetectorConfig`.
    """

    center: torch.Tensor
    spread: torch.Tensor
    template: torch.Tensor
    typical: torch.Tensor

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        width, channels = config.width, config.channels
        self.enter = nn.Linear(channels + 1, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(config.depth)])
        # One more channel is 1 everywhere: with zeros beyond the border it says where that is.
        self.convolutions = nn.ModuleList([nn.Conv2d(width + 1, width, 3, padding=1) for _ in range(config.depth)])
        self.leave = nn.Linear(width, 2 * channels)
        self.log_scale = nn.Parameter(torch.zeros(channels))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.register_buffer("center", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))
        self.register_buffer("template", torch.zeros(channels))
        self.register_buffer("typical", torch.zeros(channels))

    @property
    def num_parameters(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters())

    def standardise(self, features: torch.Tensor) -> torch.Tensor:
        """``(B, h, w, L, H, K)`` attention values as ``(B, h, w, C)``, in usual deviations from the usual value."""
        flat = features.flatten(3).to(self.center.device, torch.float32)
        return ((flat - self.center) / self.spread).clamp(-_CLIP, _CLIP)

    def forward(self, values: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict values that are hidden.

        Args:
            values: ``(B, h, w, C)``, standardised; what is hidden is not looked at.
            hidden: ``(B, h, w)`` bool, patches whose values are hidden.

        Returns:
            Location and logarithm of the scale of a Student-t distribution for each value, ``(B, h, w, C)`` float32.
        """
        seen = (~hidden).to(values.dtype)[..., None]
        state = self.enter(torch.cat([torch.where(hidden[..., None], 0.0, values), seen], -1))
        inside = torch.ones_like(state[..., :1])
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            step = torch.cat([F.gelu(norm(state)), inside.to(state.dtype)], -1).permute(0, 3, 1, 2)
            state = state + convolution(step.contiguous()).permute(0, 2, 3, 1)
        location, log_scale = self.leave(F.gelu(state)).float().chunk(2, -1)
        return location, log_scale + self.log_scale

    def loss(self, values: torch.Tensor, hidden: torch.Tensor, location: torch.Tensor, log_scale: torch.Tensor) -> Any:
        """Mean negative log-likelihood of the hidden values, up to a constant; an outlier costs its logarithm only."""
        nu = self.config.degrees
        residual = (values - location) * torch.exp(-log_scale)
        losses = log_scale + (nu + 1) / 2 * torch.log1p(residual.square() / nu)
        weights = hidden.to(losses.dtype)
        return (losses.mean(-1) * weights).sum() / weights.sum().clamp_min(1)

    @torch.no_grad()
    def surprise(self, features: torch.Tensor) -> torch.Tensor:
        """How far each attention value is from what the neighbours let expect, in units of the predicted scale.

        Every patch is hidden once: one in four at a time, so that all its neighbours are seen.

        Args:
            features: ``(B, h, w, L, H, K)`` of :func:`attention_features`.

        Returns:
            ``(B, h, w, L, H, K)`` float32; positive where a patch gets or gives more than expected.

        Raises:
            ValueError: The shape is of another model.
        """
        self._check(features.shape)
        values = self.standardise(features)
        height, width = features.shape[1:3]
        rows, columns = torch.arange(height, device=values.device), torch.arange(width, device=values.device)
        phase = 2 * (rows % 2)[:, None] + (columns % 2)[None]
        surprise = torch.zeros_like(values)
        for turn in range(4):
            hidden = (phase == turn).expand(values.shape[:3])
            location, log_scale = self(values, hidden)
            surprise = torch.where(hidden[..., None], (values - location) * torch.exp(-log_scale), surprise)
        return surprise.view(features.shape)

    def excess(self, surprise: torch.Tensor) -> torch.Tensor:
        """Root mean square of what is more than expected ``(B, h, w)``, from a surprise ``(B, h, w, L, H, K)``.

        An artifact draws attention, and patches beside it have less of it: less than expected does not count.
        """
        return surprise.clamp_min(0).square().flatten(3).mean(-1).sqrt()

    def bounded(self, surprise: torch.Tensor) -> torch.Tensor:
        """``(B, h, w, C)``: a surprise without extremes, as the template compares it."""
        return surprise.flatten(3).clamp(-_MAX_SURPRISE, _MAX_SURPRISE)

    @property
    def has_template(self) -> bool:
        """Whether the images it was trained on have patches that surprise in a way of their own."""
        return bool(self.template.any())

    @torch.no_grad()
    def score_features(self, features: torch.Tensor, template: bool = True) -> torch.Tensor:
        """``(B, h, w)`` scores from attention values ``(B, h, w, L, H, K)``; see :meth:`score`."""
        surprise = self.surprise(features)
        if not (template and self.has_template):
            return self.excess(surprise)
        return along(self.bounded(surprise), self.typical, self.template)

    @keeping_adapters
    def score(
        self,
        model: nn.Module,
        images: Any,
        *,
        image_processor: Any = None,
        batch_size: int = 32,
        max_images: int | None = None,
        template: bool = True,
        progress: bool = False,
    ) -> torch.Tensor:
        """How far each patch is out of place.

        With a template: how far its surprise goes that way. Without: the root mean square of its surprising *excess* of
        attention. Both in units of the predicted scales, 0 or larger; they cannot be compared with each other.

        Args:
            model: A model with as many blocks and heads as the one the detector was trained on; it is left as it is.
            images: Images of one size, or batches; a tensor ``(M, 3, H, W)``, and whatever else
                :func:`register_adapter.artifacts.audit` takes.
            image_processor: As for the audit.
            batch_size: Images per batch.
            max_images: Use at most this many images, the first ones.
            template: Use the template, if there is one. Artifacts of another kind than those of the training are found
                better without.
            progress: Show a bar.

        Returns:
            ``(M, h, w)`` float32 on the CPU.

        Raises:
            UnsupportedModelError: The model has other blocks, heads or kinds of tokens, or its patches no known places.
            ValueError: There are no images, or they differ in size.
        """
        scores = []
        for features in attention_features(
            model,
            images,
            image_processor=image_processor,
            batch_size=batch_size,
            max_images=max_images,
            progress=progress,
        ):
            shape = tuple(features.shape[3:])
            wanted = (self.config.blocks, self.config.heads, len(self.config.kinds))
            if shape != wanted:
                raise UnsupportedModelError(
                    f"this detector was trained on a model with (blocks, heads, kinds of values) {wanted}, and "
                    f"{type(model).__name__} has {shape}; train one on it with train_detector"
                )
            scores.append(self.score_features(features, template).cpu())
        return torch.cat(scores)

    def outliers(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool of the shape of ``scores``, with the template if there is one: those above the threshold."""
        return scores > self.config.threshold

    def _check(self, shape: torch.Size) -> None:
        wanted = (self.config.blocks, self.config.heads, len(self.config.kinds))
        if len(shape) != 6 or tuple(shape[3:]) != wanted:
            raise ValueError(
                f"features must be (B, h, w, blocks, heads, kinds) with the last three {wanted}, got {tuple(shape)}"
            )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with weights and config; an older one is replaced when the new one is whole.

        Raises:
            OSError: It cannot be written; what was there is untouched.
        """
        return write_detector(path, self.state_dict(), self.config)

    @classmethod
    def load(cls, path: str | Path) -> AttentionDetector:
        """Read a file that :meth:`save` wrote, on the CPU, in evaluation mode.

        Raises:
            AdapterFileError: It is damaged, not a detector, of a newer format, or its weights do not fit its config.
        """
        detector = cls(read_config(path))
        detector.load_state_dict(read_weights(path, detector.state_dict()))
        return detector.eval()
