"""Attention masks grow with the registers, and what they hide stays hidden."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from crossings import crossings
from families import CASES as MODELS
from families import HEADS, IMAGE, PATCH, PATCHES, build, make_inputs
from helpers import run, shapes

from register_adapter import add_registers, find_tower
from register_adapter.tuner.hooks.tokens import cut_tokens, grow_mask, insert_tokens

# Towers that take a 2-D mask; CLIP and SigLIP hand a 4-D one to their blocks as it is.
FLAT = [
    name
    for name in ("vit", "deit", "dinov2", "dinov2-registers", "msn", "ijepa", "beit-no-bias", "pixio", "tipsv2")
    if name in MODELS
]
WHOLE = [*FLAT, "clip-vision", "siglip-vision"]
HIDDEN = 4  # the last four patches: the bottom row of the image


def masked(name: str, attention: str = "sdpa") -> Any:
    """The base; a test that needs a mask is skipped where the tower takes none, as in transformers 4."""
    base = build(name, attention)
    named = {"attention_mask"} if name in FLAT else {"attention_mask", "kwargs"}
    if not named & set(inspect.signature(type(base).forward).parameters):
        pytest.skip(f"{type(base).__name__} takes no attention mask in this version of transformers")
    return base


def mask_of(kind: str, batch: int, length: int) -> torch.Tensor:
    """A mask that hides the last patches from every other token."""
    flat = torch.ones(batch, length, dtype=torch.long)
    flat[:, -HIDDEN:] = 0
    visible = flat.bool()[:, None, None].expand(batch, 1, length, length)
    if kind == "flat":
        return flat
    if kind == "flat-bool":
        return flat.bool()
    if kind == "broadcast-bool":
        return visible[:, :, :1]
    if kind == "open-padding-rows":  # as transformers does, lest a softmax over nothing gives NaN
        visible = visible.clone()
        visible[:, :, -HIDDEN:] = True
    if kind == "own-padding-rows":
        visible = visible | torch.eye(length, dtype=torch.bool)
    if kind == "heads-bool":
        visible = visible.expand(batch, HEADS, length, length)
    if kind == "additive":
        return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return visible


def outputs(model: torch.nn.Module, mask: torch.Tensor, change: float = 0.0) -> torch.Tensor:
    """What the visible tokens come to, with the hidden patches changed."""
    inputs = make_inputs("vit")
    inputs["pixel_values"][:, :, IMAGE - PATCH :] += change
    with torch.no_grad():
        return model(**inputs, attention_mask=mask).last_hidden_state[:, :-HIDDEN]


KINDS = ["bool", "broadcast-bool", "heads-bool", "additive", "open-padding-rows", "own-padding-rows"]
CASES = [(*case, "sdpa") for case in crossings(FLAT, ["flat", "flat-bool", *KINDS], whole=FLAT[:1], each=4)]
CASES += [(name, kind, "sdpa") for name in WHOLE[len(FLAT) :] for kind in KINDS]
# Eager attention adds its mask to the scores: a boolean 4-D one hides nothing there, with or without registers.
CASES += [(name, "flat", "eager") for name in FLAT] + [(name, "additive", "eager") for name in WHOLE]


@pytest.mark.parametrize(("name", "kind", "attention"), CASES)
def test_hidden_patches_do_not_leak_through_registers(name: str, kind: str, attention: str) -> None:
    base = masked(name, attention)
    length = find_tower(base).prefix + PATCHES
    mask = mask_of(kind, 2, length)
    expected = outputs(base, mask)
    torch.testing.assert_close(outputs(base, mask, change=3.0), expected, msg="the mask does not hide in the base")
    model = add_registers(base, 4, init_std=1.0).eval()
    hidden = outputs(model, mask)
    assert hidden.shape == expected.shape
    assert (hidden - expected).abs().max() > 1e-4, "registers had no effect"
    torch.testing.assert_close(outputs(model, mask, change=3.0), hidden)
    unmasked = torch.ones_like(mask) if mask.ndim == 2 else None
    assert (outputs(model, unmasked, change=3.0) - outputs(model, unmasked)).abs().max() > 1e-3


@pytest.mark.parametrize("name", FLAT)
def test_a_mask_of_ones_changes_nothing(name: str) -> None:
    model = add_registers(masked(name, "eager"), 4).eval()
    inputs, length = make_inputs(name), find_tower(build(name)).prefix + PATCHES
    results = run(model, {**inputs, "attention_mask": torch.ones(2, length)})
    for key, value in run(model, inputs).items():
        torch.testing.assert_close(results[key], value)


@pytest.mark.parametrize("name", FLAT)
def test_a_positional_mask_grows_too(name: str) -> None:
    base, inputs = masked(name), make_inputs(name)
    length = find_tower(base).prefix + PATCHES
    mask = mask_of("flat", 2, length)
    model = add_registers(base, 4).eval()
    position = list(inspect.signature(type(base).forward).parameters)[1:].index("attention_mask")
    arguments: list[Any] = [inputs["pixel_values"], *[None] * (position - 1), mask]
    with torch.no_grad():
        hidden = model(*arguments).last_hidden_state
        expected = model(**inputs, attention_mask=mask).last_hidden_state
    assert torch.equal(hidden, expected)


def test_disabled_registers_leave_the_mask_alone() -> None:
    base, inputs = masked("vit"), {**make_inputs("vit"), "attention_mask": mask_of("flat", 2, 17)}
    expected = run(base, inputs)
    model = add_registers(base, 4).eval()
    with model.disable_adapter():
        assert all(torch.equal(value, expected[key]) for key, value in run(model, inputs).items())
    assert shapes(run(model, inputs)) == shapes(expected)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_registers_are_visible_in_a_grown_2d_mask(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype)
    grown = grow_mask(mask, 1, 2)
    assert grown.dtype == dtype
    assert grown.tolist() == torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).to(dtype).tolist()


def test_registers_see_in_a_grown_4d_mask_what_cls_sees() -> None:
    cls, patch = [True, True, False], [False, True, True]
    grown = grow_mask(torch.tensor([[[cls, patch, patch]]]), 1, 2)
    new_cls, new_patch = [True, True, True, True, False], [False, True, True, True, True]
    assert grown.tolist() == [[[new_cls, new_cls, new_cls, new_patch, new_patch]]]
    additive = grow_mask(torch.tensor([[[[0.0, -1e9], [0.0, 0.0]]]]), 1, 1)
    assert additive.tolist() == [[[[0.0, 0.0, -1e9], [0.0, 0.0, -1e9], [0.0, 0.0, 0.0]]]]


def test_a_mask_of_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"got shape \(2, 3, 3\)"):
        grow_mask(torch.ones(2, 3, 3), 1, 2)


def test_cutting_undoes_inserting() -> None:
    hidden, tokens = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    for start in (0, 1, 5):
        grown = insert_tokens(hidden, [tokens[:, :1], tokens[:, 1:]], start)
        assert grown.shape == (2, 9, 3)
        assert torch.equal(grown[:, start : start + 4], tokens)
        assert torch.equal(cut_tokens(grown, start, 4, 9), hidden)
        nested = {"a": (grown, [grown, None]), "b": torch.zeros(2, 9)}
        cut = cut_tokens(nested, start, 4, 9)
        assert torch.equal(cut["a"][1][0], hidden)
        assert cut["a"][1][1] is None
        assert cut["b"].shape == (2, 9)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("siglip2-vision", "pixel_attention_mask"),
        ("idefics3-vision", "patch_attention_mask"),
        ("pix2struct-vision", "attention_mask"),
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_does_not_leak_where_registers_join_at_the_encoder(name: str, mask: str, attention: str) -> None:
    """Siglip 2 and its like make their mask behind the embeddings, from one of the patches alone."""
    base, inputs = build(name, attention), make_inputs(name)
    shape = (2, 4, 4) if name == "idefics3-vision" else (2, PATCHES)
    visible = torch.ones(shape, dtype=torch.bool)
    visible.reshape(2, -1)[:, -HIDDEN:] = False

    def outputs(model: torch.nn.Module, change: float) -> torch.Tensor:
        changed = {key: value.clone() for key, value in inputs.items()}
        pixels = changed.get("flattened_patches", changed.get("pixel_values"))
        pixels[..., -HIDDEN:, :] += 0
        if pixels.ndim == 4:
            pixels[:, :, IMAGE - PATCH :] += change
        else:
            pixels[:, -HIDDEN:, 2:] += change
        with torch.no_grad():
            return model(**{**changed, mask: visible}).last_hidden_state[:, :-HIDDEN]

    torch.testing.assert_close(outputs(base, 3.0), outputs(base, 0.0), msg="the mask does not hide in the base")
    plain = outputs(base, 0.0)
    model = add_registers(base, 4, init_std=1.0).eval()
    assert (outputs(model, 0.0) - plain).abs().max() > 1e-4
    torch.testing.assert_close(outputs(model, 3.0), outputs(model, 0.0))


@pytest.mark.parametrize("layer", [1, 2])
def test_registers_that_start_late_have_room_in_the_masks_of_every_block_behind(layer: int) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**{**build("vit").config.to_dict(), "num_hidden_layers": 4})
    model, inputs = (
        add_registers(ViTModel(config).eval(), 3, init_std=1.0, insert_layer=layer).eval(),
        make_inputs("vit"),
    )
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        program = torch.export.export(model, (), inputs, strict=False)  # a ViT makes its mask here
        torch.testing.assert_close(program.module()(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("layer", [1, 2])
def test_padding_does_not_leak_where_registers_start_late(layer: int) -> None:
    kind, config = type(build("siglip2-vision")), build("siglip2-vision").config
    base = kind(type(config)(**{**config.to_dict(), "num_hidden_layers": 4}))
    model, inputs = add_registers(base, 3, init_std=1.0, insert_layer=layer).eval(), make_inputs("siglip2-vision")
    inputs["pixel_attention_mask"][:, -HIDDEN:] = 0
    outputs = []
    for change in (0.0, 3.0):
        inputs["pixel_values"][:, -HIDDEN:] += change
        with torch.no_grad():
            outputs.append(model(**inputs).last_hidden_state[:, :-HIDDEN])
    torch.testing.assert_close(outputs[1], outputs[0])
