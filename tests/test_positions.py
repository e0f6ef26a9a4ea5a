"""Position embeddings at a smaller grid: stripes without antialiasing, none with it, and nothing else is touched."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
import transformers as tf
from families import build, perturb
from helpers import hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from register_adapter import UnsupportedModelError, add_registers, attention_map, capture, find_tower
from register_adapter.features import antialiased_positions
from register_adapter.towers.calls import first_of

PATCH, TRAINED, SMALLER, WIDTH = 4, 37, 16, 32
#: Waves over the image: many for 16 patches (Nyquist 8), few enough for 37 (Nyquist 18.5).
FINE = 14.0

_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "hidden_act": "gelu",
}


def _make(kind: str, grid: int) -> Any:
    shape = {**_SHAPE, "image_size": grid * PATCH}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = {
            "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**shape, mlp_ratio=2)),
            "vit": lambda: tf.ViTModel(tf.ViTConfig(**shape, intermediate_size=64)),
            "siglip": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**shape, intermediate_size=64)),
            "dpt": lambda: tf.DPTModel(
                tf.DPTConfig(**shape, intermediate_size=64, is_hybrid=False, backbone_out_indices=[0, 1])
            ),
        }[kind]()
    return model.eval().requires_grad_(False)


def _waves(grid: int, fine: float) -> torch.Tensor:
    """``(grid², D)``: a smooth function of the place, as trained position embeddings have, and fine waves along x."""
    place = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(place, place, indexing="ij")
    channel = torch.arange(WIDTH)
    smooth = torch.sin(math.pi * x[..., None] + channel) + torch.cos(math.pi * y[..., None] + 2 * channel)
    stripes = torch.cos(2 * math.pi * FINE * x[..., None] + channel)
    return (smooth + fine * stripes).reshape(-1, WIDTH)


def _with_positions(kind: str, grid: int, fine: float) -> Any:
    """The model for a grid, with known positions; all other weights are the same for every grid."""
    model, source = _make(kind, grid), _make(kind, TRAINED)
    perturb(source)
    place = find_tower(model).part("position_embedding")
    weight = place.weight if isinstance(place, torch.nn.Embedding) else place.data[0]
    others = {name: value for name, value in source.state_dict().items() if "position" not in name}
    assert not model.load_state_dict(others, strict=False).unexpected_keys
    with torch.no_grad():
        weight[: -(grid**2)] = 0
        weight[-(grid**2) :] = _waves(grid, fine)
    return model


def _norm_map(model: Any, pixels: torch.Tensor, antialias: bool) -> torch.Tensor:
    """Norms of the patch tokens that enter the first block."""
    tower = find_tower(model)
    context = antialiased_positions(tower) if antialias else contextlib.nullcontext()
    with torch.no_grad(), capture(model, attentions=False) as trace, context:
        tower.run(pixels)
    return trace.patches(0)[0].norm(dim=-1).reshape(SMALLER, SMALLER)


def _stripes(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far a map's columns wander from those of a map without aliasing, as a share of the map's mean.

    The outermost columns are left out: there an interpolation has no neighbours on one side.
    """
    difference = (actual - wanted).mean(0)[2:-2]
    return float(difference.std() / wanted.mean())


@pytest.mark.parametrize("kind", ["dinov2", "vit", "siglip", "dpt"])
def test_a_smaller_grid_gives_stripes_without_antialiasing_and_none_with_it(kind: str) -> None:
    """On an image of one colour whatever pattern is seen is that of the positions."""
    pixels = torch.full((1, 3, SMALLER * PATCH, SMALLER * PATCH), 0.3)
    # Nothing is interpolated in the model for this grid, and what it cannot show is not in its positions.
    wanted = _norm_map(_with_positions(kind, SMALLER, 0.0), pixels, antialias=False)
    model = _with_positions(kind, TRAINED, 0.5)
    without, smooth = (_stripes(_norm_map(model, pixels, antialias), wanted) for antialias in (False, True))
    assert without > 0.05
    assert smooth < 0.01
    assert smooth < without / 10


def test_stripes_reach_the_attention_map_and_attention_map_has_none() -> None:
    pixels = torch.full((3, SMALLER * PATCH, SMALLER * PATCH), 0.3)
    wanted = torch.from_numpy(attention_map(_with_positions("dinov2", SMALLER, 0.0), pixels))
    model = _with_positions("dinov2", TRAINED, 0.5)
    without = _stripes(torch.from_numpy(attention_map(model, pixels, antialias=False)), wanted)
    smooth = _stripes(torch.from_numpy(attention_map(model, pixels)), wanted)
    assert without > 0.015
    assert smooth < without / 10


class _Watch(TorchFunctionMode):
    """Whether each interpolation was antialiased."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate:
            self.seen.append(kwargs.get("antialias", False))
        return func(*args, **kwargs)


def _interpolations(model: Any, side: int, registers: int = 0) -> list[bool]:
    model = add_registers(model, registers).eval() if registers else model
    tower = find_tower(model)
    with torch.no_grad(), _Watch() as watch, antialiased_positions(tower):
        tower.run(torch.randn(1, 3, side, side))
    return watch.seen


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("name", ["dinov2", "vit", "deit", "clip-vision", "siglip-vision", "ijepa", "dpt"])
def test_it_reaches_every_family_that_interpolates(name: str, registers: int) -> None:
    assert _interpolations(build(name), 16, registers) == [True]
    assert _interpolations(build(name), 48, registers) == [False]  # larger: as the model does it


def test_positions_between_blocks_are_reached_too() -> None:
    options = {"use_mid_position_embeddings": True, "intermediate_size": 64, "num_detection_tokens": 2}
    model = tf.YolosModel(tf.YolosConfig(**{**_SHAPE, "image_size": [32, 32]}, **options)).eval()
    assert _interpolations(model, 16) == [True, True]


@pytest.mark.parametrize("side", [32, 48])
def test_registers_get_none_of_the_positions_between_blocks(side: int) -> None:
    """As of the blocks called one by one; from a later block on there would be no room for them."""
    options = {"use_mid_position_embeddings": True, "intermediate_size": 64, "num_detection_tokens": 2}
    base = tf.YolosModel(tf.YolosConfig(**{**_SHAPE, "image_size": [32, 32]}, **options)).eval()
    (between,) = (value for name, value in base.named_parameters() if name.endswith("mid_position_embeddings"))
    torch.nn.init.normal_(between)
    seen: list[torch.Tensor] = []
    base.encoder.interpolation.register_forward_hook(lambda *call: seen.append(call[-1].detach()))
    with pytest.raises(UnsupportedModelError, match="insert_layer cannot be had with YolosModel"):
        add_registers(base, 2, insert_layer=1)
    pixels = torch.randn(1, 3, side, side)
    model = add_registers(base, 2, init_std=1.0).eval()
    with torch.no_grad():
        output = model(pixel_values=pixels).last_hidden_state
        (registers,) = (value[None] for value in model.parameters() if value.requires_grad)
        base, positions = model.unload(), seen[-1]
        hidden = base.embeddings(pixels)
        hidden = torch.cat([hidden[:, :1], registers, hidden[:, 1:]], 1)
        for index, block in enumerate(base.encoder.layer):
            hidden = first_of(block(hidden))
            if index < len(positions):
                zeros = torch.zeros_like(registers)
                hidden = hidden + torch.cat([positions[index][:, :1], zeros, positions[index][:, 1:]], 1)
        wanted = base.layernorm(torch.cat([hidden[:, :1], hidden[:, 3:]], 1))
    torch.testing.assert_close(output, wanted)


def test_relative_position_biases_are_left_alone() -> None:
    """BEiT's absolute positions come first, then the tables of its blocks, whose channels are heads."""
    seen = _interpolations(build("beit"), 16)
    assert seen[0]
    assert len(seen) > 1
    assert not any(seen[1:])


def test_half_precision_is_interpolated_in_float32() -> None:
    model = _with_positions("vit", TRAINED, 0.5).to(torch.bfloat16)
    pixels = torch.full((1, 3, SMALLER * PATCH, SMALLER * PATCH), 0.3, dtype=torch.bfloat16)
    wanted = _norm_map(_with_positions("vit", SMALLER, 0.0), pixels.float(), antialias=False)
    assert _stripes(_norm_map(model, pixels, True).float(), wanted) < 0.01


def test_the_size_it_was_trained_at_is_computed_bit_for_bit() -> None:
    model, pixels = build("dinov2"), torch.randn(2, 3, 32, 32)
    tower = find_tower(model)
    with torch.no_grad():
        wanted = tower.run(pixels).last_hidden_state
        with antialiased_positions(tower):
            hidden = tower.run(pixels).last_hidden_state
    assert torch.equal(hidden, wanted)


def test_only_the_towers_own_positions_are_touched_and_nothing_is_left_behind() -> None:
    model = build("dinov2")
    tower, installed = find_tower(model), hooks(model)
    grid = torch.randn(1, tower.hidden_size, 8, 8)
    wanted = F.interpolate(grid, size=(4, 4), mode="bicubic")
    with torch.no_grad(), antialiased_positions(tower):
        tower.run(torch.randn(1, 3, 16, 16))
        assert torch.equal(F.interpolate(grid, size=(4, 4), mode="bicubic"), wanted)
    assert hooks(model) == installed
    with pytest.raises(ValueError, match="channel"), antialiased_positions(tower):
        tower.run(torch.randn(1, 4, 16, 16))  # a channel too many
    assert hooks(model) == installed
    with _Watch() as watch, torch.no_grad():
        tower.run(torch.randn(1, 3, 16, 16))
    assert watch.seen == [False]
