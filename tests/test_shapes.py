"""Every output of a model with registers has the base model's shape."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from crossings import crossings
from families import BLOCKS, CASES, HEADS, KINDS, PATCHES, TOWERS, build, make_inputs
from helpers import differs, run, shapes

from register_adapter import add_registers, find_tower
from register_adapter.towers.tower import Tower
from register_adapter.tuner.hooks.attention import reads_implementation


def kind_of(tower: Tower) -> tuple[object, ...]:
    """Which parts an anatomy has, and how the tower attends."""
    parts = tuple(field.name for field in fields(tower.anatomy) if getattr(tower.anatomy, field.name))
    return parts, min(tower.prefix, 2), reads_implementation(tower)


@pytest.mark.slow
def test_every_model_has_one_tower_of_its_family() -> None:
    families = {name: find_tower(build(name)).anatomy.family for name in CASES}
    assert families == {name: case.family for name, case in CASES.items()}


@pytest.mark.slow
@pytest.mark.skipif("molmo2-vision" not in CASES, reason="transformers 4 has not all models of KINDS")
def test_every_kind_of_anatomy_has_a_model_that_meets_every_option() -> None:
    kinds = {name: kind_of(find_tower(build(name))) for name in CASES}
    met = {kinds[name] for name in KINDS}
    assert {name: kind for name, kind in kinds.items() if kind not in met} == {}


ATTENTIONS, COUNTS, PRECISIONS, FORMS = ("eager", "sdpa"), (1, 4, 16), ("float32", "bfloat16"), ("dict", "tuple")


@pytest.mark.parametrize(
    ("name", "attention", "num_registers", "precision", "form"),
    sorted(
        {
            *crossings(CASES, ATTENTIONS, COUNTS, PRECISIONS, FORMS),
            *crossings(KINDS, ATTENTIONS, COUNTS, PRECISIONS, FORMS, each=4),
        }
    ),
)
def test_outputs_have_the_shape_and_dtype_of_the_base(
    name: str, attention: str, num_registers: int, precision: str, form: str
) -> None:
    dtype = getattr(torch, precision)
    base, inputs = build(name, attention, dtype), make_inputs(name, dtype=dtype)
    ask = {"output_hidden_states": True, "return_dict": form == "dict"}
    ask |= {"output_attentions": True} if attention == "eager" else {}
    with torch.no_grad():
        assert isinstance(base(**inputs, **ask), tuple) == (form == "tuple")
    expected, expected_plain = run(base, inputs, **ask), run(base, inputs)
    model = add_registers(base, num_registers, init_std=1.0).eval()
    outputs = run(model, inputs, **ask)
    assert shapes(outputs) == shapes(expected)
    assert {k: v.dtype for k, v in outputs.items()} == {k: v.dtype for k, v in expected.items()}
    assert differs(outputs, expected), "registers had no effect at all"
    assert all(torch.isfinite(tensor).all() for tensor in outputs.values())
    assert shapes(run(model, inputs)) == shapes(expected_plain)


@pytest.mark.slow
def test_attentions_and_hidden_states_are_there_to_be_cut() -> None:
    """The matrix above would pass on a model that returns none of them."""
    for name in (name for name, case in CASES.items() if case.whole):
        outputs = run(build(name, "eager"), make_inputs(name), output_hidden_states=True, output_attentions=True)
        assert sum(key.startswith("hidden_states.") for key in outputs) == BLOCKS + 1, name
        assert sum(key.startswith("attentions.") for key in outputs) == BLOCKS, name


@pytest.mark.parametrize("name", TOWERS)
def test_full_attentions_keep_registers_and_rows_that_sum_to_one(name: str) -> None:
    base, inputs = build(name, "eager"), make_inputs(name)
    expected = run(base, inputs, output_attentions=True)
    outputs = run(add_registers(base, 4, attentions="full").eval(), inputs, output_attentions=True)
    length = expected["attentions.0"].shape[-1]
    for key, tensor in outputs.items():
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


@pytest.mark.parametrize(("name", "batch"), crossings(TOWERS, (1, 4)))
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
        features = add_registers(base, 4).eval().get_image_features(pixel_values=pixel_values)
        if not isinstance(expected, torch.Tensor):  # transformers 4 returns the features alone
            features, expected = features["pooler_output"], expected["pooler_output"]
        assert features.shape == expected.shape
        assert not torch.equal(features, expected)
