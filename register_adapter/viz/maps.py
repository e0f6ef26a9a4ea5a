"""Maps of one image: norms, attention, and the features behind them, read off one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import RegisterAdapterError
from ..features.attention_maps import record_attention_maps
from ..features.finite import check_finite_features, subject_in_words
from ..features.grid import watch_patches
from ..features.layout import adapters_stay, find_layout, tower_of
from ..features.positions import antialiased_positions
from ..features.subjects import looking_at
from ..features.trace import capture
from ..towers.tower import Tower
from ..utils.arguments import check_whole
from .images import ImageInputError, PreparedImage

__all__ = ["ImageMaps", "Maps", "read_image_maps", "read_maps"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImageMaps:
    """One image under one model; ``(h, w)`` is the grid of patches.

    Attributes:
        norms: ``(L + 1, h, w)`` L2 norms of the patch tokens, before the final LayerNorm; entry 0 is the input of the
            first block, ``i + 1`` the output of block ``i``.
        attention: ``(H, h, w)`` attention to the patches in block ``block``, of CLS; where there is no CLS, the mean
            over all queries (what a patch receives).
        block: Index of the block whose attention it is.
        query: ``"CLS"``, or ``"all tokens"`` where there is none.
        registers: ``(R, h, w)`` attention of each register to the patches in that block, mean over heads; registers
            that the model was made with come first.
        register_names: ``(R,)`` what to call them.
        features: ``(h * w, D)`` patch tokens behind that block; behind the final LayerNorm where the block is the last
            and the model's patch tokens go through it.
        normed: Whether they are.
        colours: ``(h, w, 3)`` in 0…1, principal components of ``features`` as red, green and blue; see
            :func:`~register_adapter.viz.principal_colours`. ``None`` until they are fitted.
    """

    norms: Array
    attention: Array
    block: int
    query: str
    registers: Array
    register_names: tuple[str, ...]
    features: torch.Tensor
    normed: bool
    colours: Array | None = None


class _Rows:
    """Keeps of all maps ``(1, H, N, N)`` the first rows of one block's, those of ``count`` tokens, and its mean row."""

    def __init__(self, block: int, count: int) -> None:
        self.block, self.count = block, count
        self.rows, self.mean = torch.empty(0), torch.empty(0)

    def keep(self, index: int, maps: torch.Tensor) -> None:
        if index == self.block:
            length = maps.shape[2]  # keys of key/value pairs stand behind the tokens
            self.rows = maps[0, :, : self.count, :length].float()
            self.mean = maps[0, :, :, :length].float().mean(1)


@torch.no_grad()
def read_image_maps(model: nn.Module, image: PreparedImage, block: int = -1, antialias: bool = True) -> ImageMaps:
    """Maps of a prepared image under ``model`` as it stands, with or without registers.

    Attention maps of other blocks are dropped as they come, so that a large model and image fit into memory.

    Args:
        model: In the mode and with the adapters it is to be looked at.
        image: From :func:`~register_adapter.viz.images.prepare_image`.
        block: Index of the block whose attention and features are read, -1 for the last.
        antialias: Interpolate position embeddings with antialiasing; see
            :func:`~register_adapter.features.antialiased_positions`.

    Raises:
        ValueError: There is no such block.
        ImageInputError: The model fails on an image of this size.
        UnsupportedModelError: Places of its patches are not known.
        RegisterAdapterError: Hidden states or attention maps are not finite (NaN or infinite).
    """
    tower, registers = tower_of(model)
    blocks = len(tower.part("blocks"))
    check_whole("block", block)
    if not -blocks <= block < blocks:
        raise ValueError(f"block={block}, and {type(tower.module).__name__} has {blocks} blocks")
    block %= blocks
    with ExitStack() as stack:
        stack.enter_context(adapters_stay(registers))
        layout = find_layout(tower, registers, block + 1)
        first = layout.first_patch
        rows = _Rows(block, first)
        trace = stack.enter_context(capture(model, attentions=False))
        stack.enter_context(record_attention_maps(tower, rows.keep))
        patches = stack.enter_context(watch_patches(tower))
        if antialias:
            stack.enter_context(antialiased_positions(tower))
        _run(tower, image.inputs)
    who = subject_in_words(model)
    for index in range(blocks + 1):
        check_finite_features({"hidden states": trace.patches(index)[:1]}, who, index)
    check_finite_features({"attention maps": rows.mean[None]}, who, block + 1)
    grid = image.grid or patches.shape(1, trace.patches().shape[1], image.inputs)
    kept = grid[0] * grid[1]  # padding stands behind the patches
    attention = rows.rows[:, :, first : first + kept]
    seen = attention[:, 0] if layout.num_cls else rows.mean[:, first : first + kept]
    features = trace.patches(block + 1)[0, :kept]
    norm = tower.part("final_norm") if tower.anatomy.norm_patches and block == blocks - 1 else None
    if norm is not None:
        features = norm.forward(features)  # registers leave by a hook on this very module
    return ImageMaps(
        norms=np.stack(
            [_map(trace.patches(index)[0, :kept].float().norm(dim=-1), grid) for index in range(blocks + 1)]
        ),
        attention=_map(seen, grid),
        block=block,
        query="CLS" if layout.num_cls else "all tokens",
        registers=_map(attention[:, layout.num_cls : first].mean(0), grid),
        register_names=layout.names[layout.num_cls :],
        features=features.float().cpu(),
        normed=norm is not None,
    )


def _map(values: torch.Tensor, grid: tuple[int, int]) -> Array:
    """``(..., h, w)`` from ``(..., h * w)``."""
    array: Array = values.reshape(*values.shape[:-1], *grid).float().cpu().numpy()
    return array


def _arguments(tower: Tower, inputs: torch.Tensor | Mapping[str, torch.Tensor]) -> Any:
    """What the tower's forward is called with, on its device and in its dtype."""
    like = next(parameter for parameter in tower.module.parameters() if parameter.is_floating_point())

    def moved(value: torch.Tensor) -> torch.Tensor:
        return value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)

    if isinstance(inputs, torch.Tensor):
        return moved(inputs)
    keywords = {name: moved(value) for name, value in inputs.items()}
    name = "pixel_attention_mask"
    if name in keywords and name not in inspect.signature(tower.module.forward).parameters:
        keywords["attention_mask"] = keywords.pop(name)  # the module inside SigLIP 2's, in transformers 4
    return keywords


def _run(tower: Tower, inputs: torch.Tensor | Mapping[str, torch.Tensor]) -> None:
    arguments = _arguments(tower, inputs)
    try:
        tower.run(arguments)
    except (RegisterAdapterError, torch.OutOfMemoryError):
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        shape = arguments.shape if isinstance(arguments, torch.Tensor) else arguments["pixel_values"].shape
        raise ImageInputError(
            f"{type(tower.module).__name__} fails on pixel values {tuple(shape)}: {error}. A model that does not "
            "interpolate its position embeddings takes images of one size only; leave size=None, or build it so that "
            "it does (timm: dynamic_img_size=True)"
        ) from error


@dataclass(frozen=True)
class Maps:
    """Maps of a few images of one size under one model.

    Attributes:
        name: What to call the model above its columns.
        norms: ``(B, h, w)`` float32, L2 norms of the patch tokens behind the last block, before the final LayerNorm.
        attention: ``(B, h, w)`` float32, attention of CLS to the patches in the last block, mean over heads; where
            there is no CLS, the attention that a patch receives, mean over all queries.
    """

    name: str
    norms: Array
    attention: Array


def read_maps(name: str, model: nn.Module, pixel_values: torch.Tensor) -> Maps:
    """Norm and attention maps of ``(B, 3, H, W)`` pixel values under ``model``, with or without registers."""
    with looking_at(model), adapters_stay(tower_of(model)[1]):
        prepared = [PreparedImage(pixels[None], np.empty(0, np.uint8), None) for pixels in pixel_values]
        maps = [read_image_maps(model, image) for image in prepared]
    norms, attention = [image.norms[-1] for image in maps], [image.attention.mean(0) for image in maps]
    return Maps(name, np.stack(norms), np.stack(attention))
