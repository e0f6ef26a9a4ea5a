"""Blocks that somebody wraps after registers were added: in a module that takes anything and hands it on."""

from __future__ import annotations

from typing import Any

import pytest
from execution_cases import registered
from families import build, make_inputs
from helpers import assert_identical, run
from stacks_cases import build_stack, images
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from register_adapter import add_registers, find_tower
from register_adapter.towers.anatomy import parent


class Around(nn.Module):
    """A wrapper of somebody's own, that does not show what it holds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Around, checkpoint_wrapper])
@pytest.mark.parametrize(
    ("name", "way"), [("beit", "default"), ("beit", "key_value"), ("vit", "deep"), ("vit", "gate"), ("vit", "neurons")]
)
def test_wrapped_blocks_give_the_same(name: str, way: str, wrap: Any) -> None:
    model, inputs = registered(name, way, build(name)), make_inputs(name)
    expected = run(model, inputs)
    blocks = find_tower(model).part("blocks")
    for index, block in enumerate(blocks):
        blocks[index] = wrap(block)
    assert_identical(run(model, inputs), expected)


def test_rotary_tables_among_wrapped_blocks() -> None:
    model, inputs = add_registers(build_stack("eva02"), 3, init_std=1.0).eval(), {"x": images()}
    expected = run(model, inputs)
    blocks = find_tower(model).part("blocks")
    for index, block in enumerate(blocks):
        blocks[index] = Around(block)
    assert_identical(run(model, inputs), expected)


def test_a_wrapped_list_of_blocks_is_seen_through() -> None:
    tower = find_tower(build("vit"))
    blocks = tower.part("blocks")
    owner, name = parent(tower.module, tower.anatomy.blocks)
    setattr(owner, name, Around(blocks))
    assert tower.part("blocks") is blocks
