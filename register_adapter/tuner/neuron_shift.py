"""Moving the activations of register neurons from patches to registers, which needs no training.

A few MLP units of one or two blocks, the register neurons, write the large vectors that make artifacts. "Vision
Transformers Don't Need Trained Registers" (arXiv 2506.08010) gives a register each neuron's activation of largest
magnitude, and takes it from every other token. Here that is done image by image and neuron by neuron, on what goes into
the last linear layer of a block's MLP, so that plain and gated MLPs are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["REMOVALS", "NeuronShift", "checked_neurons", "count_neurons"]

#: Block to its register neurons, or to their number where the file beside a config says which they are.
Neurons = Mapping[int, list[int] | int]


def checked_neurons(neurons: Mapping[Any, Any], numbers_only: bool) -> dict[int, list[int] | int]:
    """Register neurons in the order of blocks.

    Args:
        neurons: As a user or a JSON file gives them, whose keys are strings.
        numbers_only: Whether a number may stand for the neurons themselves.

    Raises:
        ValueError: They are not such a dictionary, or a neuron is named twice.
    """

    def fits(value: Any) -> bool:
        if isinstance(value, list):
            return (
                bool(value) and all(type(unit) is int and unit >= 0 for unit in value) and len(set(value)) == len(value)
            )
        return numbers_only and type(value) is int and value > 0

    blocks = {int(key): value for key, value in neurons.items() if str(key).isdecimal()}
    if len(blocks) != len(neurons) or not all(fits(value) for value in blocks.values()):
        raise ValueError(
            "register_neurons must be a dictionary from the index of a block to a list of hidden units of its MLP, "
            f"each once, got {dict(neurons)!r}"
        )
    return dict(sorted(blocks.items()))


def count_neurons(neurons: Neurons) -> dict[int, int]:
    """Block to the number of its register neurons."""
    return {block: units if isinstance(units, int) else len(units) for block, units in neurons.items()}


def _nothing(activations: torch.Tensor, usual: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(activations)


def _usual(activations: torch.Tensor, usual: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    return usual.expand_as(activations)


def _usual_for_outliers(activations: torch.Tensor, usual: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    return torch.where(activations.abs() > limits, usual, activations)


#: What a token that is not a register keeps of its activations ``(B, N, K)``, given the usual ones and limits ``(K,)``.
REMOVALS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "zero": _nothing,
    "mean": _usual,
    "outliers": _usual_for_outliers,
}


class NeuronShift(nn.Module):
    """The register neurons of one adapter; mixed into :class:`RegisterTokens`, for the sake of flat keys in the file.

    Attributes:
        slices: Block to its part of the K neurons, which stand in the order of blocks; empty without any.
        units: ``(K,)`` int64, indices of hidden units of the blocks' MLPs; -1 while not known.
        usual: ``(K,)``, mean activation over usual patch tokens.
        limits: ``(K,)``, |activation| beyond which a token is an outlier.
        strength: ``(K,)``, share of the way from the activation as it is (0) to the shifted one (1); clamped to 0…1 in
            the forward pass, with the gradient passed straight through.
    """

    units: torch.Tensor
    usual: torch.Tensor
    limits: torch.Tensor
    strength: torch.Tensor
    slices: dict[int, slice]

    def add_neurons(self, neurons: Neurons, remove: str, trainable: bool, pending: bool) -> None:
        """Have these neurons.

        Args:
            neurons: Block to its register neurons, or to their number if the file says which they are.
            remove: Key of :data:`REMOVALS`.
            trainable: Whether the strengths get gradients.
            pending: The values are to come from a file.
        """
        self.remove = remove
        self.slices = {}
        known: list[int] = []
        for block, units in sorted(neurons.items()):
            new = [-1] * units if isinstance(units, int) else units
            self.slices[block] = slice(len(known), len(known) + len(new))
            known += new
        start = len(known)
        self.register_buffer("units", torch.tensor(known))
        waiting = torch.full((start,), torch.nan)
        self.register_buffer("usual", waiting.clone() if pending else torch.zeros(start))
        self.register_buffer("limits", waiting.clone() if pending else torch.zeros(start))
        strength = waiting if pending else torch.ones(start)
        if trainable:
            self.strength = nn.Parameter(strength)
        else:
            self.register_buffer("strength", strength)

    @torch.no_grad()
    def set_usual(self, usual: torch.Tensor, limits: torch.Tensor) -> None:
        """Say what a usual patch has, ``(K,)`` each, in the order of blocks; needed unless ``remove`` is ``"zero"``."""
        self.usual.copy_(usual)
        self.limits.copy_(limits)

    def neurons(self) -> dict[int, list[int]]:
        """Block to the indices of its register neurons."""
        return {block: self.units[part].tolist() for block, part in self.slices.items()}

    def shift(
        self,
        activations: torch.Tensor,
        block: int,
        start: int,
        count: int,
        visible: torch.Tensor | None = None,
        strength: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Activations with the shift done.

        Args:
            activations: ``(B, N, M)``, what goes into the last linear layer of the MLP.
            block: Index of the block.
            start: Position of the first register.
            count: Number of registers in the sequence; 0 only removes.
            visible: ``(B, N)`` bool, the tokens that may reach the registers; ``None`` for all.
            strength: ``(K,)`` of all neurons, by a call of what wraps this module (FSDP); default: this module's own.
        """
        part = self.slices[block]
        index = self.units[part].expand(*activations.shape[:-1], -1)
        given = activations.gather(-1, index)
        usual, limits = self.usual[part].to(given), self.limits[part].to(given)
        wanted = REMOVALS[self.remove](given, usual, limits)
        if count:
            seen = given if visible is None else given.masked_fill(~visible.unsqueeze(-1), 0)
            peak = seen.gather(-2, seen.abs().argmax(-2, keepdim=True))
            peaks = peak.expand(-1, count, -1)
            wanted = torch.cat([wanted[:, :start], peaks, wanted[:, start + count :]], dim=1)
        strength = (self(given, part="strength") if strength is None else strength)[part]
        strength = strength + (strength.clamp(0, 1) - strength).detach()
        # scatter, not index_copy: it has an ONNX operator.
        return activations.scatter(-1, index, torch.lerp(given, wanted, strength))
