"""Maps of one picture: norms, attention, and the features behind them, read off one forward pass."""

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
from ..features.grid import watch_patches
from ..features.layout import find_layout, tower_of
from ..features.positions import antialiased_positions
from ..features.trace import capture
from ..towers.tower import Tower
from .pictures import Picture, PictureError
from .subjects import looking_at

__all__ = ["Maps", "PictureMaps", "read_maps", "read_picture"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PictureMaps:
    """One picture under one model; ``(h, w)`` is the grid of patches.

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
def read_picture(model: nn.Module, picture: Picture, layer: int = -1, antialias: bool = True) -> PictureMaps:
    """Maps of a prepared picture under ``model`` as it stands, with or without registers.

    Attention maps of other blocks are dropped as they come, so that a large model and picture fit into memory.

    Args:
        model: In the mode and with the adapters it is to be looked at.
        picture: From :func:`~register_adapter.viz.pictures.prepare_picture`.
        layer: Index of the block whose attention and features are read, -1 for the last.
        antialias: Interpolate position embeddings with antialiasing; see
            :func:`~register_adapter.features.antialiased_positions`.

    Raises:
        ValueError: There is no such block.
        PictureError: The model fails on a picture of this size.
        UnsupportedModelError: Places of its patches are not known.
    """
    tower, registers = tower_of(model)
    blocks = len(tower.part("blocks"))
    if not -blocks <= layer < blocks:
        raise ValueError(f"layer={layer}, and {type(tower.module).__name__} has {blocks} blocks")
    block = layer % blocks
    layout = find_layout(tower, registers, block + 1)
    first = layout.first_patch
    rows = _Rows(block, first)
    with ExitStack() as stack:
        trace = stack.enter_context(capture(model, attentions=False))
        stack.enter_context(record_attention_maps(tower, rows.keep))
        patches = stack.enter_context(watch_patches(tower))
        if antialias:
            stack.enter_context(antialiased_positions(tower))
        _run(tower, picture.inputs)
    grid = picture.grid or patches.shape(1, trace.patches().shape[1], picture.inputs)
    kept = grid[0] * grid[1]  # padding stands behind the patches
    attention = rows.rows[:, :, first : first + kept]
    seen = attention[:, 0] if layout.num_cls else rows.mean[:, first : first + kept]
    features = trace.patches(block + 1)[0, :kept]
    norm = tower.part("final_norm") if tower.anatomy.norm_patches and block == blocks - 1 else None
    if norm is not None:
        features = norm.forward(features)  # registers leave by a hook on this very module
    return PictureMaps(
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
    found: Array = values.reshape(*values.shape[:-1], *grid).float().cpu().numpy()
    return found


def _arguments(tower: Tower, inputs: torch.Tensor | Mapping[str, torch.Tensor]) -> Any:
    """What the tower's forward is called with, on its device and in its dtype."""
    like = next(parameter for parameter in tower.module.parameters() if parameter.is_floating_point())

    def moved(value: torch.Tensor) -> torch.Tensor:
        return value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)

    if isinstance(inputs, torch.Tensor):
        return moved(inputs)
    found = {name: moved(value) for name, value in inputs.items()}
    name = "pixel_attention_mask"
    if name in found and name not in inspect.signature(tower.module.forward).parameters:
        found["attention_mask"] = found.pop(name)  # the module inside SigLIP 2's, in transformers 4
    return found


def _run(tower: Tower, inputs: torch.Tensor | Mapping[str, torch.Tensor]) -> None:
    arguments = _arguments(tower, inputs)
    try:
        tower.run(arguments)
    except (RegisterAdapterError, torch.OutOfMemoryError):
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        shape = arguments.shape if isinstance(arguments, torch.Tensor) else arguments["pixel_values"].shape
        raise PictureError(
            f"{type(tower.module).__name__} fails on pixel values {tuple(shape)}: {error}. A model that does not "
            "interpolate its position embeddings takes pictures of one size only; leave size=None, or build it so that "
            "it does (timm: dynamic_img_size=True)"
        ) from error


@dataclass(frozen=True)
class Maps:
    """Maps of a few pictures of one size under one model.

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
    with looking_at(model):
        found = [read_picture(model, Picture(image[None], np.empty(0, np.uint8), None)) for image in pixel_values]
    return Maps(name, np.stack([one.norms[-1] for one in found]), np.stack([one.attention.mean(0) for one in found]))
