"""Code that runs some of a tower's blocks, or a part of the tower alone: patches are never taken for registers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import assert_identical, flatten, run
from stacks_cases import build_stack, images
from torch import nn

from register_adapter import UnsupportedModelError, add_registers
from register_adapter.towers.calls import first_of
from register_adapter.tuner.layer import require_register_layer

WAYS: list[dict[str, Any]] = [{"insert_layer": 1}, {"insert_layer": 1, "deep": True}, {"insert_layer": 1, "gate": -1.0}]


def only(*indices: int) -> Callable[[Any], None]:
    """Have an encoder's forward call these blocks alone; its list of blocks stays as it is."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        for index in indices:
            result = self.layer[index](hidden_states)
            hidden_states = result[0] if isinstance(result, tuple) else result
        return BaseModelOutput(last_hidden_state=hidden_states)

    def change(model: Any) -> None:
        encoder = model.get_base_model().encoder
        encoder.forward = MethodType(forward, encoder)

    return change


def four_blocks() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    config = build("dinov2").config.to_dict() | {"num_hidden_layers": 4}
    return Dinov2Model(Dinov2Config(**config)).eval()


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("blocks", [(2, 3), (0, 2, 3), (0,), (), (0, 1, 1, 2, 3)], ids=str)
def test_a_pass_in_which_registers_do_not_enter_is_refused(blocks: tuple[int, ...], options: dict[str, Any]) -> None:
    if not hasattr(four_blocks(), "encoder"):
        pytest.skip("the blocks have another place in this version of transformers")
    model, inputs = add_registers(four_blocks(), 3, init_std=1.0, **options).eval(), make_inputs("dinov2")
    whole = run(model, inputs)
    only(*blocks)(model)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"enter at block 1, which this forward pass did not call"):
            model(**inputs)
    with model.disable_adapter():
        assert run(model, inputs)["last_hidden_state"].shape == whole["last_hidden_state"].shape
    del model.get_base_model().encoder.forward
    assert_identical(run(model, inputs), whole)


@pytest.mark.parametrize("blocks", [(0, 2, 3), (3, 1), ()], ids=str)
def test_registers_from_the_embeddings_go_through_some_blocks(blocks: tuple[int, ...]) -> None:
    model, inputs = add_registers(four_blocks(), 3, init_std=1.0).eval(), make_inputs("dinov2")
    length = run(model, inputs)["last_hidden_state"].shape
    only(*blocks)(model)
    assert run(model, inputs)["last_hidden_state"].shape == length


def test_skipped_embeddings_are_refused() -> None:
    model, inputs = add_registers(four_blocks(), 3).eval(), make_inputs("dinov2")
    embeddings = model.get_base_model().embeddings
    model.get_base_model().embeddings.__class__ = type(
        "Direct", (type(embeddings),), {"__call__": lambda self, *args, **kwargs: self.forward(*args, **kwargs)}
    )
    with pytest.raises(UnsupportedModelError, match="3 registers should be in the sequence of Dinov2Model by now, and"):
        model(**inputs)


@pytest.mark.parametrize("options", [{}, *WAYS[:2]], ids=str)
def test_a_norm_that_is_called_alone_cuts_nothing(options: dict[str, Any]) -> None:
    base = build_stack("timm")
    tokens = torch.randn(2, 17, base.embed_dim)
    expected = base.norm(tokens)
    add_registers(base, 3, **options).eval()
    for _ in range(2):
        torch.testing.assert_close(base.norm(tokens), expected)
        base(images())


@pytest.mark.parametrize("options", [{}, *WAYS[:2]], ids=str)
def test_parts_that_are_called_in_order_take_registers_out_again(options: dict[str, Any]) -> None:
    base = add_registers(build_stack("timm"), 3, init_std=1.0, **options).eval().get_base_model()
    with torch.no_grad():
        expected = base.forward_features(images())
        hidden = base.norm_pre(base.patch_drop(base._pos_embed(base.patch_embed(images()))))
        for block in base.blocks:
            hidden = block(hidden)
        torch.testing.assert_close(base.norm(hidden), expected)


@pytest.mark.parametrize("options", [{}, *WAYS[:1]], ids=str)
@pytest.mark.slow
def test_parts_that_are_compiled_one_by_one_are_not_taken_for_skipped(options: dict[str, Any]) -> None:
    model, inputs = add_registers(build("dinov2"), 3, init_std=1.0, **options).eval(), make_inputs("dinov2")
    expected = run(model, inputs)["last_hidden_state"]
    torch._dynamo.reset()
    base = model.get_base_model()
    for part in (base.embeddings, *base.encoder.layer):
        part.compile(backend="eager")
    torch.testing.assert_close(run(model, inputs)["last_hidden_state"], expected)


@pytest.mark.parametrize("parts", ["blocks", "embeddings"])
@pytest.mark.parametrize("blocks", [(2, 3), (0, 2, 3), (0, 1, 1, 2, 3)], ids=str)
@pytest.mark.slow
def test_compiled_parts_that_are_skipped_are_told_by_the_length(blocks: tuple[int, ...], parts: str) -> None:
    """Where both are compiled, or the whole model is, nobody counts."""
    if parts == "embeddings" and 0 not in blocks:
        pytest.skip("no eager hook sees the sequence before its end")
    model, inputs = add_registers(four_blocks(), 3, init_std=1.0, insert_layer=1).eval(), make_inputs("dinov2")
    expected = run(model, inputs)["last_hidden_state"]
    torch._dynamo.reset()
    base = model.get_base_model()
    for part in base.encoder.layer if parts == "blocks" else [base.embeddings]:
        part.compile(backend="eager")
    torch.testing.assert_close(run(model, inputs)["last_hidden_state"], expected)
    only(*blocks)(model)
    with pytest.raises(
        UnsupportedModelError, match=r"3 registers should be in the sequence of Dinov2Model by now, and"
    ):
        run(model, inputs)
    del base.encoder.forward
    torch.testing.assert_close(run(model, inputs)["last_hidden_state"], expected)


@pytest.mark.parametrize("options", [{}, {"deep": True}, {"insert_layer": 1}, {"gate": -1.0}], ids=str)
@pytest.mark.parametrize("family", ["vit", "clip", "dinov2", "timm"])
def test_a_hook_that_returns_a_sequence_without_registers_is_refused(family: str, options: dict[str, Any]) -> None:
    """Patches would be cut out in their place: what the base had there is put into a pass with registers."""
    if family == "timm" and "gate" in options:
        pytest.skip("timm has no place for gates")
    base, given = (build_stack("timm"), (images(),)) if family == "timm" else (build(family), ())
    inputs = make_inputs(family) if family != "timm" else {}
    model = add_registers(base, 3, init_std=1.0, **options).eval()
    block, kept = require_register_layer(model).tower.part("blocks")[1], []
    with torch.no_grad():
        expected = flatten(model(*given, **inputs))
        for there in (model.disable_adapter(), nullcontext()):
            handle = block.register_forward_hook(lambda module, args, output: kept.append(output))
            with there:
                model(*given, **inputs)
            handle.remove()
        handle = block.register_forward_hook(lambda module, args, output: kept[0])
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match=r"3 registers entered \w+, and behind its blocks"):
                model(*given, **inputs)
        with model.disable_adapter():
            model(*given, **inputs)
        handle.remove()
        handle = block.register_forward_hook(lambda module, args, output: kept[1])
        torch.testing.assert_close(flatten(model(*given, **inputs)), expected)
        handle.remove()
    torch.testing.assert_close(flatten(model(*given, **inputs)), expected)


def test_a_norm_gets_a_sequence_without_registers_after_the_embeddings_were_called() -> None:
    base = build_stack("timm")
    tokens = torch.randn(2, 17, base.embed_dim)
    expected = base.norm(tokens)
    add_registers(base, 3).eval()
    base.norm_pre(base.patch_drop(base._pos_embed(base.patch_embed(images()))))
    torch.testing.assert_close(base.norm(tokens), expected)


def test_blocks_may_drop_other_tokens() -> None:
    """As token pruning does: registers stay where they are."""
    model, inputs = add_registers(four_blocks(), 3, init_std=1.0).eval(), make_inputs("dinov2")
    length = run(model, inputs)["last_hidden_state"].shape[1]
    model.get_base_model().encoder.layer[1].register_forward_hook(lambda module, args, output: first_of(output)[:, :-5])
    assert run(model, inputs)["last_hidden_state"].shape[1] == length - 5
