"""Which base model an adapter belongs to: an identity of the vision tower that can be compared later.

The fingerprint must survive whatever people do to the same weights (another dtype, device, quantisation of the linear
layers, another head around the tower, other adapters) and must change with the weights. A hash cannot do that, a sketch
can: the tensors that no quantiser touches are multiplied by fixed signs and summed into a few buckets (count sketch,
Charikar et al. 2002), in units of the tensor's own norm. Rounding to bfloat16 moves a bucket by about 0.001.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .anatomy import Tower

__all__ = ["TowerIdentity", "fingerprint"]

BUCKETS = 8
TOLERANCE = 0.02


def _sketch(values: torch.Tensor) -> list[float]:
    """``BUCKETS`` signed sums of a flat tensor, divided by its norm."""
    index = torch.arange(values.numel(), device=values.device)
    # Knuth's multiplicative hash, the same on every platform and device.
    signs = ((index * 2654435761) >> 15 & 1).to(torch.float32).mul_(2).sub_(1)
    signed = values * signs
    signed = nn.functional.pad(signed, (0, -values.numel() % BUCKETS)).view(-1, BUCKETS).sum(0, dtype=torch.float64)
    norm = values.norm(dtype=torch.float64).clamp_min(1e-12)
    return [round(value, 4) for value in (signed / norm).tolist()]


def fingerprint(tower: Tower) -> list[float] | None:
    """A sketch of the tower's weights: patch embedding, position embeddings, biases of the blocks.

    Args:
        tower: The tower; adapters inside it do not count.

    Returns:
        ``3 * BUCKETS`` floats, or ``None`` where weights are not at hand (meta device, sharded parameters).
    """
    position = tower.part("position_embedding")
    groups: list[Iterable[Any]] = [
        [getattr(tower.part("patch_embedding"), "weight", None)],
        [getattr(position, "weight", position)],
        (p for n, p in tower.part("blocks").named_parameters() if n.endswith(".bias")),
    ]
    sketches: list[float] = []
    with torch.no_grad():
        for group in groups:
            tensors = [tensor.detach() for tensor in group if isinstance(tensor, torch.Tensor)]
            if any(tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "device_mesh") for tensor in tensors):
                return None
            flat = [tensor.flatten().to(torch.float32) for tensor in tensors if tensor.is_floating_point()]
            sketches += _sketch(torch.cat([part.to(flat[0].device) for part in flat])) if flat else [0.0] * BUCKETS
    return sketches


@dataclass(frozen=True)
class TowerIdentity:
    """What is written into an adapter's config about its base model's vision tower.

    Attributes:
        family: The row's family.
        hidden_size: Width D of a token.
        num_hidden_layers: Number of transformer blocks.
        patch_size: Side of a patch in pixels, if the tower says it.
        fingerprint: Sketch of the weights, ``None`` if they were not at hand.
    """

    family: str
    hidden_size: int
    num_hidden_layers: int
    patch_size: int | None = None
    fingerprint: list[float] | None = None

    @classmethod
    def of(cls, tower: Tower) -> TowerIdentity:
        """The identity of a tower."""
        blocks = len(tower.part("blocks"))
        return cls(tower.anatomy.family, tower.hidden_size, blocks, tower.patch_size, fingerprint(tower))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        shape = f"{self.num_hidden_layers} blocks of width {self.hidden_size}"
        patch = f", patch {self.patch_size}" if self.patch_size else ""
        code = f", weights {abs(hash(tuple(self.fingerprint))) % 0xFFFFFF:06x}" if self.fingerprint else ""
        return f"{self.family} ({shape}{patch}{code})"

    def differences(self, other: TowerIdentity) -> list[str]:
        """Names of the fields in which two identities differ; empty if they can be the same weights."""
        names = ("family", "hidden_size", "num_hidden_layers", "patch_size")
        found = [name for name in names if getattr(self, name) != getattr(other, name)]
        if not found and self.fingerprint and other.fingerprint:
            pairs = zip(self.fingerprint, other.fingerprint, strict=True)
            if max(abs(a - b) for a, b in pairs) > TOLERANCE:
                found.append("weights")
        return found
