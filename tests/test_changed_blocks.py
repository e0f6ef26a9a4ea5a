"""Blocks or a whole tower that somebody takes out, adds or replaces after registers were added."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from families import build, make_inputs
from helpers import assert_identical, run
from stacks_cases import build_stack, images
from torch import nn
from transformers import Dinov2ForImageClassification

from register_adapter import UnsupportedModelError, add_registers, find_register_layer, find_tower

LATE: list[dict[str, Any]] = [
    {"insert_layer": 1, **more} for more in ({}, {"deep": True}, {"key_value": True}, {"gate": -1.0})
]
NEURONS: dict[str, Any] = {"register_neurons": {1: [0, 3]}}


def dinov2(**options: Any) -> tuple[nn.Module, Any, dict[str, Any]]:
    model = add_registers(build("dinov2"), 3, init_std=1.0, **options).eval()
    return model, model.get_base_model().encoder, make_inputs("dinov2")


def cut(encoder: Any) -> None:
    encoder.layer = encoder.layer[:1]


def share(encoder: Any) -> None:
    encoder.layer[1] = encoder.layer[0]


def append(encoder: Any) -> None:
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 has one entry of a head mask for each block of the config")
    encoder.layer.append(copy.deepcopy(build("dinov2").encoder.layer[0]))


class Idle(nn.Module):
    """A block that does nothing."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def idle(encoder: Any) -> None:
    encoder.layer[1] = Idle()


def share_attention(encoder: Any) -> None:
    encoder.layer[1].attention = encoder.layer[0].attention


def share_mlp(encoder: Any) -> None:
    encoder.layer[1].mlp = encoder.layer[0].mlp


CASES: list[tuple[Callable[[Any], None], dict[str, Any], str]] = [
    *((cut, options, "enter at block 1, and Dinov2Model has 1 block now") for options in LATE),
    (cut, NEURONS, "neurons in block 1, and Dinov2Model has 1 block now"),
    *((share, options, "blocks 0 and 1 of Dinov2Model are one module") for options in (*LATE, NEURONS)),
    *((append, options, "values for blocks 1 to 1, and Dinov2Model has 3 blocks now") for options in LATE[1:]),
    *((idle, options, "block 1 of Dinov2Model, of class Idle, does not") for options in LATE[2:]),
    (idle, NEURONS, "block 1 of Dinov2Model, now of class Idle, without an MLP"),
    *((share_attention, options, "blocks 0 and 1 of Dinov2Model share one attention") for options in LATE[2:]),
    (share_mlp, {"register_neurons": {0: [1], 1: [0, 3]}}, "share an MLP"),
]


@pytest.mark.parametrize(("change", "options", "message"), CASES)
def test_an_adapter_that_does_not_fit_the_blocks_any_more_is_refused(
    change: Callable[[Any], None], options: dict[str, Any], message: str
) -> None:
    model, encoder, inputs = dinov2(**options)
    before, layers = run(model, inputs), encoder.layer
    kept = list(layers)
    change(encoder)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=message):
            model(**inputs)
    with model.disable_adapter(), torch.no_grad():
        model(**inputs)
    if change in (cut, share, idle, append):
        encoder.layer = nn.ModuleList(kept)
        assert_identical(run(model, inputs), before)


@pytest.mark.parametrize("change", [cut, share, idle], ids=lambda change: change.__name__)
@pytest.mark.parametrize("options", LATE, ids=str)
def test_without_the_adapter_changed_blocks_give_what_the_base_gives(options: Any, change: Any) -> None:
    model, encoder, inputs = dinov2(**options)
    base = copy.deepcopy(model).unload()
    change(encoder)
    change(base.encoder)
    with model.disable_adapter():
        assert_identical(run(model, inputs), run(base, inputs))
    assert_identical(run(model.unload(), inputs), run(base, inputs))


@pytest.mark.parametrize("change", [append, share, cut, idle], ids=lambda change: change.__name__)
def test_registers_from_the_embeddings_go_through_any_blocks(change: Callable[[Any], None]) -> None:
    model, encoder, inputs = dinov2()
    lengths = [run(model, inputs)["last_hidden_state"].shape]
    change(encoder)
    lengths.append(run(model, inputs)["last_hidden_state"].shape)
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("options", [*LATE, NEURONS], ids=str)
def test_a_base_whose_blocks_are_one_module_is_refused_at_once(options: dict[str, Any]) -> None:
    base = build("dinov2")
    share(base.encoder)
    before = set(base.state_dict())
    with pytest.raises(UnsupportedModelError, match="blocks 0 and 1 of Dinov2Model are one module"):
        add_registers(base, 3, **options)
    assert set(base.state_dict()) == before


@pytest.mark.parametrize("prune_norm", [False, True])
@pytest.mark.parametrize("options", LATE[:2], ids=str)
def test_pruned_blocks_are_refused_in_every_way_of_calling(prune_norm: bool, options: dict[str, Any]) -> None:
    model = add_registers(build_stack("timm"), 3, **options).eval()
    base = model.get_base_model()
    base.prune_intermediate_layers([0], prune_norm=prune_norm)
    for call in (base, base.forward_features, base.forward_intermediates):
        with pytest.raises(UnsupportedModelError, match="enter at block 1, and VisionTransformer has 1 block now"):
            call(images())


@pytest.mark.parametrize("options", [LATE[0], LATE[2]], ids=str)
@pytest.mark.slow
def test_a_graph_of_pruned_blocks_is_refused(options: dict[str, Any]) -> None:
    model, encoder, inputs = dinov2(**options)
    cut(encoder)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"UnsupportedModelError|behind the last"):
        torch.compile(model, fullgraph=True, backend="eager")(**inputs)


def classifier() -> Any:
    config = build("dinov2").config
    return Dinov2ForImageClassification(config).eval()


def test_a_replaced_tower_is_refused_by_name() -> None:
    model, inputs = add_registers(classifier(), 3, init_std=1.0).eval(), make_inputs("dinov2")
    base = model.get_base_model()
    before, tower, other = run(model, inputs), base.dinov2, classifier()
    base.dinov2 = other.dinov2
    for candidate in (model, copy.deepcopy(model)):
        with pytest.raises(UnsupportedModelError, match=r"Dinov2Model at 'dinov2'.* is no longer in Dinov2For"):
            candidate(**inputs)
    with model.disable_adapter():
        run(model, inputs)
    base.dinov2 = tower
    assert_identical(run(model, inputs), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap", [partial(torch.compile, backend="eager"), nn.DataParallel], ids=["compile", "parallel"]
)
def test_a_wrapped_tower_is_still_there(wrap: Callable[[nn.Module], Any]) -> None:
    model, inputs = add_registers(classifier(), 3, init_std=1.0).eval(), make_inputs("dinov2")
    before = run(model, inputs)
    base = model.get_base_model()
    base.dinov2 = wrap(base.dinov2)
    torch.testing.assert_close(run(model, inputs)["logits"], before["logits"])


def test_images_with_adapters_of_their_own_go_through_a_replaced_block() -> None:
    model, encoder, inputs = dinov2()
    names = ["default", "__base__"]
    with torch.no_grad():
        expected = model(**inputs, adapter_names=names).last_hidden_state
        encoder.layer[1] = copy.deepcopy(encoder.layer[1])
        again = model(**inputs, adapter_names=names).last_hidden_state
    torch.testing.assert_close(again, expected)
    assert find_register_layer(model) is find_tower(model).module.registers
