"""A Dinov2WithRegistersModel and a Dinov2Model with its weights and its registers as adapter are the same function."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from families import BLOCKS, HEADS, IMAGE, PATCH, PATCHES, WIDTH, perturb

from register_adapter import add_registers, capture, find_register_layer


def pair(
    attention: str, swiglu: bool, registers: int = 4, image: int = IMAGE
) -> tuple[tf.PreTrainedModel, torch.nn.Module]:
    """The native model, and the plain one with its weights and its registers."""
    shape = {
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS + 1,
        "num_attention_heads": HEADS,
        "image_size": image,
        "patch_size": PATCH,
        "use_swiglu_ffn": swiglu,
        "attn_implementation": attention,
    }
    torch.manual_seed(0)
    native = tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**shape, num_register_tokens=registers)).eval()
    # Nothing may be at its trivial initial value, or a misplaced LayerNorm or bias would not show.
    perturb(native, scale=0.1)
    plain = tf.Dinov2Model(tf.Dinov2Config(**shape)).eval()
    weights = native.state_dict()
    tokens = weights.pop("embeddings.register_tokens")
    plain.load_state_dict(weights)
    model = add_registers(plain, registers).eval()
    with torch.no_grad():
        find_register_layer(model).tokens("default").weight.copy_(tokens[0])
    return native, model


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


@pytest.mark.parametrize("registers", [1, 4, 16])
@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_native_registers_and_the_adapter_are_the_same_function(attention: str, swiglu: bool, registers: int) -> None:
    native, model = pair(attention, swiglu, registers)
    pixel_values = torch.randn(2, 3, IMAGE, IMAGE)
    with torch.no_grad():
        expected = native(pixel_values, output_hidden_states=True)
        outputs = model(pixel_values, output_hidden_states=True)
        with capture(model, attentions=False) as trace:
            model(pixel_values)
    assert expected.last_hidden_state.abs().max() > 0.5
    last = expected.last_hidden_state
    assert largest_difference(outputs.last_hidden_state[:, 0], last[:, 0]) <= 1e-5
    assert largest_difference(outputs.pooler_output, expected.pooler_output) <= 1e-5
    assert largest_difference(outputs.last_hidden_state[:, 1:], last[:, 1 + registers :]) <= 1e-5
    assert largest_difference(trace.registers, last[:, 1 : 1 + registers]) <= 1e-5
    assert len(outputs.hidden_states) == len(expected.hidden_states) == len(trace.hidden_states) == BLOCKS + 2
    for mine, theirs, whole in zip(outputs.hidden_states, expected.hidden_states, trace.hidden_states, strict=True):
        kept = torch.cat([theirs[:, :1], theirs[:, 1 + registers :]], dim=1)
        assert mine.shape == (2, 1 + PATCHES, WIDTH)
        assert largest_difference(mine, kept) <= 1e-5
        assert largest_difference(whole, theirs) <= 1e-5


def test_attention_maps_are_the_native_ones() -> None:
    native, model = pair("eager", swiglu=False)
    pixel_values = torch.randn(2, 3, IMAGE, IMAGE)
    with torch.no_grad():
        expected = native(pixel_values, output_attentions=True).attentions
        with capture(model) as trace:
            model(pixel_values)
    for mine, theirs in zip(trace.attentions, expected, strict=True):
        assert largest_difference(mine, theirs) <= 1e-5


def test_gradients_of_the_registers_are_the_native_ones() -> None:
    native, model = pair("sdpa", swiglu=False)
    pixel_values = torch.randn(2, 3, IMAGE, IMAGE)
    native(pixel_values).pooler_output.square().sum().backward()
    model(pixel_values).pooler_output.square().sum().backward()
    expected = native.embeddings.register_tokens.grad[0]
    gradient = find_register_layer(model).tokens("default").weight.grad
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
