"""Rotary tables with a row for every token: registers have no position, so they are not turned."""

from __future__ import annotations

import pytest
import torch
from families import CASES, build, make_inputs
from helpers import run

from register_adapter import add_registers, find_register_layer
from register_adapter.tuner.tokens import grow_rotary

R = 3


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_new_rows_turn_nothing(start: int, kind: type) -> None:
    angles = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    tables = kind([angles.cos(), angles.sin()])
    grown = grow_rotary(tables, start, R)
    assert type(grown) is kind
    for new, old, value in zip(grown, tables, (1.0, 0.0), strict=True):
        assert torch.equal(new[start : start + R], torch.full((R, 8), value))
        assert torch.equal(torch.cat([new[:start], new[start + R :]]), old)


@pytest.mark.skipif("mlcd-vision" not in CASES, reason="transformers without MLCD")
@pytest.mark.parametrize("insert_layer", [0, 1])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_mlcd_computes_what_its_blocks_give_for_registers_without_a_position(insert_layer: int, attention: str) -> None:
    """The blocks, called one by one on the whole sequence with tables written by hand, are the oracle."""
    inputs = make_inputs("mlcd-vision")
    model = add_registers(build("mlcd-vision", attention), R, init_std=1.0, insert_layer=insert_layer).eval()
    base = build("mlcd-vision", attention)
    tower = getattr(base, "vision_model", base)
    embeddings: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = tower.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: embeddings.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    run(base, inputs)
    handle.remove()
    cos, sin = embeddings[0]
    width = cos.shape[-1]
    grown = (
        torch.cat([cos[:1], torch.ones(R, width), cos[1:]]),
        torch.cat([sin[:1], torch.zeros(R, width), sin[1:]]),
    )
    layer = find_register_layer(model)
    registers = layer.tokens("default").weight.detach().expand(2, -1, -1)
    with torch.no_grad():
        hidden = tower.embeddings(inputs["pixel_values"])
        if insert_layer == 0:
            hidden = torch.cat([hidden[:, :1], registers, hidden[:, 1:]], dim=1)
        hidden = tower.pre_layrnorm(hidden)
        for index, block in enumerate(tower.encoder.layers):
            if index == insert_layer == 1:
                hidden = torch.cat([hidden[:, :1], registers, hidden[:, 1:]], dim=1)
            tables = grown if index >= insert_layer else (cos, sin)
            output = block(hidden_states=hidden, position_embeddings=tables, attention_mask=None)
            hidden = output[0] if isinstance(output, tuple) else output
    expected = torch.cat([hidden[:, :1], hidden[:, 1 + R :]], dim=1)
    assert torch.equal(run(model, inputs)["last_hidden_state"], expected)
