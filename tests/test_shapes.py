"""Every output of a model with registers has the base model's shape."""

from __future__ import annotations

import pytest
import torch
from families import BLOCKS, CASES, HEADS, PATCHES, TOWERS, build, make_inputs
from helpers import differs, run, shapes

from register_adapter import add_registers, find_tower

# A family's first case and its bare towers with each number of registers, its other heads with four.
_FIRST = {case.family: name for name, case in reversed(CASES.items())}
NUMBERS = [
    (name, count)
    for name, case in CASES.items()
    for count in ([1, 4, 16] if name in TOWERS or _FIRST[case.family] == name else [4])
]


@pytest.mark.parametrize("name", CASES)
def test_the_model_has_one_tower_of_its_family(name: str) -> None:
    assert find_tower(build(name)).anatomy.family == CASES[name].family


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "num_registers"), NUMBERS)
def test_outputs_have_the_shape_and_dtype_of_the_base(
    name: str, attention: str, num_registers: int, dtype: torch.dtype
) -> None:
    base, inputs = build(name, attention, dtype), make_inputs(name, dtype=dtype)
    ask = {"output_hidden_states": True, **({"output_attentions": True} if attention == "eager" else {})}
    expected, expected_plain = run(base, inputs, **ask), run(base, inputs)
    model = add_registers(base, num_registers, init_std=1.0).eval()
    found = run(model, inputs, **ask)
    assert shapes(found) == shapes(expected)
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
    assert differs(found, expected), "registers had no effect at all"
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert shapes(run(model, inputs)) == shapes(expected_plain)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.whole])
def test_attentions_and_hidden_states_are_there_to_be_cut(name: str) -> None:
    """The matrix above would pass on a model that returns none of them."""
    outputs = run(build(name, "eager"), make_inputs(name), output_hidden_states=True, output_attentions=True)
    assert sum(key.startswith("hidden_states.") for key in outputs) == BLOCKS + 1
    assert sum(key.startswith("attentions.") for key in outputs) == BLOCKS


@pytest.mark.parametrize("name", CASES)
def test_tuple_outputs_have_the_shape_of_the_base(name: str) -> None:
    base, inputs = build(name, "eager"), make_inputs(name)
    ask = {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    expected = run(base, inputs, **ask)
    with torch.no_grad():
        assert isinstance(base(**inputs, **ask), tuple)
    found = run(add_registers(base, 4).eval(), inputs, **ask)
    assert shapes(found) == shapes(expected)
    assert differs(found, expected)


@pytest.mark.parametrize("name", TOWERS)
def test_full_attentions_keep_registers_and_rows_that_sum_to_one(name: str) -> None:
    base, inputs = build(name, "eager"), make_inputs(name)
    expected = run(base, inputs, output_attentions=True)
    found = run(add_registers(base, 4, attentions="full").eval(), inputs, output_attentions=True)
    length = expected["attentions.0"].shape[-1]
    for key, tensor in found.items():
        if key.startswith("attentions."):
            assert tensor.shape == (2, HEADS, length + 4, length + 4)
            torch.testing.assert_close(tensor.sum(-1), torch.ones(2, HEADS, length + 4))
        else:
            assert tensor.shape == expected[key].shape


@pytest.mark.parametrize("name", TOWERS)
def test_sliced_attentions_are_the_full_ones_without_registers(name: str) -> None:
    inputs = make_inputs(name)
    maps = {}
    for mode in ("slice", "full"):
        torch.manual_seed(0)
        model = add_registers(build(name, "eager"), 4, attentions=mode).eval()
        maps[mode] = run(model, inputs, output_attentions=True)["attentions.1"]
    prefix = maps["slice"].shape[-1] - PATCHES
    keep = [*range(prefix), *range(prefix + 4, prefix + 4 + PATCHES)]
    assert torch.equal(maps["slice"], maps["full"][:, :, keep][..., keep])


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("batch", [1, 4])
def test_a_full_length_that_equals_another_size_is_not_cut(name: str, batch: int) -> None:
    """Cutting goes by length: a hidden state whose other sizes equal it must be cut along tokens only."""
    prefix = find_tower(build(name)).prefix
    num_registers = 32 - PATCHES - prefix  # the sequence is as long as the hidden size
    base, inputs = build(name, "eager"), make_inputs(name, batch=batch)
    ask = {"output_hidden_states": True, "output_attentions": True}
    expected = run(base, inputs, **ask)
    assert shapes(run(add_registers(base, num_registers).eval(), inputs, **ask)) == shapes(expected)


def test_image_features_of_clip_and_siglip_have_the_shape_of_the_base() -> None:
    for name in ("clip", "siglip"):
        base, pixel_values = build(name), make_inputs(name)["pixel_values"]
        expected = base.get_image_features(pixel_values=pixel_values)
        found = add_registers(base, 4).eval().get_image_features(pixel_values=pixel_values)
        if not isinstance(expected, torch.Tensor):  # transformers 4 returns the features alone
            found, expected = found["pooler_output"], expected["pooler_output"]
        assert found.shape == expected.shape
        assert not torch.equal(found, expected)
