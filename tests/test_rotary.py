"""Rotary tables with a row for every token: registers have no position, so they are not turned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CASES, build, make_inputs
from helpers import run
from torch import nn

from register_adapter import add_registers, find_register_layer
from register_adapter.tuner.hooks.tokens import grow_rotary

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


def rotary_tables(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines that the blocks of an MLCD are given."""
    tables: list[tuple[torch.Tensor, torch.Tensor]] = []
    tower = getattr(model, "vision_model", model)
    handle = tower.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: tables.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    run(model, inputs)
    handle.remove()
    return tables[0]


def by_hand(base: nn.Module, inputs: dict[str, Any], registers: torch.Tensor, insert_layer: int) -> torch.Tensor:
    """Last hidden state of an MLCD with ``registers`` ``(B, R, d)``: its blocks one by one, on the whole sequence."""
    tower = getattr(base, "vision_model", base)
    cos, sin = rotary_tables(base, inputs)
    none = torch.ones(R, cos.shape[-1])
    grown = (torch.cat([cos[:1], none, cos[1:]]), torch.cat([sin[:1], 0 * none, sin[1:]]))
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
    return torch.cat([hidden[:, :1], hidden[:, 1 + R :]], dim=1)


@pytest.mark.skipif("mlcd-vision" not in CASES, reason="transformers without MLCD")
@pytest.mark.parametrize("insert_layer", [0, 1])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.slow
def test_mlcd_computes_what_its_blocks_give_for_registers_without_a_position(insert_layer: int, attention: str) -> None:
    inputs = make_inputs("mlcd-vision")
    model = add_registers(build("mlcd-vision", attention), R, init_std=1.0, insert_layer=insert_layer).eval()
    registers = find_register_layer(model).tokens("default").weight.detach().expand(2, -1, -1)
    expected = by_hand(build("mlcd-vision", attention), inputs, registers, insert_layer)
    assert torch.equal(run(model, inputs)["last_hidden_state"], expected)
