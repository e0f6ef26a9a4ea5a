"""Registers under what people do to models: other resolutions, checkpointing, autocast, copies, pickles."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from crossings import crossings
from families import FAMILIES, PATCH, TOWERS, build, make_inputs
from helpers import assert_identical, differs, run, shapes

from register_adapter import add_registers, find_register_layer, find_tower


def registered(name: str, attention: str = "sdpa", **options: Any) -> torch.nn.Module:
    return add_registers(build(name, attention), 4, **options).eval()


def gradient(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    weight = find_register_layer(model).tokens("default").weight
    weight.grad = None
    model(**inputs).last_hidden_state.square().sum().backward()
    return weight.grad


@pytest.mark.parametrize(("name", "size"), crossings(TOWERS, (24, 40, 64), whole=("vit", "beit", "dinov3")))
def test_another_resolution_has_the_shapes_of_the_base(name: str, size: int) -> None:
    if name == "molmo2-vision":
        pytest.skip("its position embeddings have one size")
    base, inputs = build(name, "eager"), make_inputs(name, size=size)
    ask: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    parameters = inspect.signature(base.forward).parameters
    # DINOv2 always interpolates; its forward has no such argument. Others have none in transformers 4.
    if not name.startswith("dinov2") and {"interpolate_pos_encoding", "kwargs"} & set(parameters):
        ask["interpolate_pos_encoding"] = True
    expected = run(base, inputs, **ask)
    assert expected["last_hidden_state"].shape[1] == (size // PATCH) ** 2 + find_tower(base).prefix
    outputs = run(add_registers(base, 4).eval(), inputs, **ask)
    assert shapes(outputs) == shapes(expected)
    assert differs(outputs, expected)


def test_resolutions_can_alternate() -> None:
    model = registered("dinov2")
    small, large = make_inputs("dinov2", size=24), make_inputs("dinov2", size=64)
    first = run(model, small)
    run(model, large)
    assert_identical(run(model, small), first)


def passes_gradients(name: str) -> bool:
    """Whether reentrant checkpointing keeps gradients of the base's own input: MLCD's in transformers 4 does not."""
    base = build(name).train()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    find_tower(base).part("embeddings").register_forward_hook(lambda module, args, output: output.requires_grad_())
    return base(**make_inputs(name)).last_hidden_state.requires_grad


@pytest.mark.parametrize(("name", "reentrant"), crossings(TOWERS, (True, False), whole=("vit", "beit", "dinov3")))
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    if name == "mlcd-vision" and reentrant and not passes_gradients(name):
        pytest.skip("this transformers loses the gradients of this base, with any adapter")
    model, inputs = registered(name).train(), make_inputs(name)
    expected = gradient(model, inputs)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    torch.testing.assert_close(gradient(model, inputs), expected)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize("name", TOWERS)
def test_registers_added_to_a_checkpointing_base_get_gradients(name: str) -> None:
    if name == "mlcd-vision" and not passes_gradients(name):
        pytest.skip("this transformers loses the gradients of this base, with any adapter")
    base, inputs = build(name).train(), make_inputs(name)
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.enable_input_require_grads()
    try:
        base(**inputs)
    except AttributeError as error:
        pytest.skip(f"this transformers cannot have gradients at the input of this base, with any adapter: {error}")
    base.disable_input_require_grads()
    assert gradient(add_registers(base, 4).train(), inputs).abs().sum() > 0


@pytest.mark.parametrize(("name", "precision"), crossings(TOWERS, ("bfloat16", "float16"), whole=("vit",)))
def test_autocast_runs_and_trains_float32_registers(name: str, precision: str) -> None:
    model, inputs = registered(name), make_inputs(name)
    expected = run(model, inputs)["last_hidden_state"]
    with torch.autocast("cpu", dtype=getattr(torch, precision)):
        hidden = run(model, inputs)["last_hidden_state"]
        grad = gradient(model, inputs)
    assert grad.dtype == torch.float32
    assert torch.isfinite(grad).all()
    assert grad.abs().sum() > 0
    assert (hidden.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_deep_copy_has_registers_of_its_own(name: str) -> None:
    model, inputs = registered(name), make_inputs(name)
    expected = run(model, inputs)
    twin = copy.deepcopy(model)
    assert_identical(run(twin, inputs), expected)
    with torch.no_grad():
        find_register_layer(twin).tokens("default").weight.add_(1.0)
    assert differs(run(twin, inputs), expected)
    assert_identical(run(model, inputs), expected)
    with twin.disable_adapter():
        assert_identical(run(twin, inputs), run(build(name), inputs))
    assert_identical(run(model, inputs), expected)
    twin.unload()
    assert find_register_layer(twin.base_model.model) is None
    assert_identical(run(model, inputs), expected)


@pytest.mark.parametrize("name", TOWERS)
def test_a_deep_copy_of_the_base_keeps_its_registers(name: str) -> None:
    model, inputs = registered(name), make_inputs(name)
    twin = copy.deepcopy(model.get_base_model())
    assert find_register_layer(twin) is not find_register_layer(model)
    assert find_register_layer(twin).tower.module is find_tower(twin).module
    assert_identical(run(twin, inputs), run(model, inputs))


@pytest.mark.parametrize("name", TOWERS)
def test_pickle_and_torch_save_keep_the_registers(name: str) -> None:
    model, inputs = registered(name), make_inputs(name)
    expected = run(model, inputs)
    again = pickle.loads(pickle.dumps(model))
    assert_identical(run(again, inputs), expected)
    with torch.no_grad():
        find_register_layer(again).tokens("default").weight.zero_()
    assert differs(run(again, inputs), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_identical(run(torch.load(buffer, weights_only=False), inputs), expected)
    assert_identical(run(model, inputs), expected)


@pytest.mark.parametrize("name", TOWERS)
def test_a_state_dict_moves_registers_to_another_model(name: str) -> None:
    model, inputs = registered(name, init_std=1.0), make_inputs(name)
    other = registered(name, init_std=1.0)
    assert differs(run(other, inputs), run(model, inputs))
    other.load_state_dict(model.state_dict())
    assert_identical(run(other, inputs), run(model, inputs))


def test_casting_the_whole_model_casts_the_registers() -> None:
    model = registered("vit").to(torch.bfloat16)
    assert find_register_layer(model).tokens("default").weight.dtype == torch.bfloat16
    assert run(model, make_inputs("vit", dtype=torch.bfloat16))["last_hidden_state"].dtype == torch.bfloat16


def test_positional_and_keyword_pixel_values_are_the_same() -> None:
    model, pixel_values = registered("vit"), make_inputs("vit")["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(pixel_values).last_hidden_state, model(pixel_values=pixel_values).last_hidden_state)


def test_a_batch_gives_what_single_images_give() -> None:
    model, pixel_values = registered("dinov2"), make_inputs("dinov2", batch=3)["pixel_values"]
    with torch.no_grad():
        together = model(pixel_values).last_hidden_state
        alone = torch.cat([model(image[None]).last_hidden_state for image in pixel_values])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_inference_mode_runs() -> None:
    with torch.inference_mode():
        assert registered("vit")(**make_inputs("vit")).last_hidden_state.shape == (2, 17, 32)


@pytest.mark.parametrize("name", TOWERS)
def test_the_attention_implementation_can_be_switched(name: str) -> None:
    model, inputs = registered(name, "sdpa"), make_inputs(name)
    expected = run(model, inputs)
    model.get_base_model().set_attn_implementation("eager")
    for key, value in run(model, inputs).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
