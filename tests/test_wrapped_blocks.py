"""Blocks that somebody wraps after registers were added: in a module that takes anything and hands it on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from execution_cases import registered
from families import CASES, build, make_inputs
from helpers import assert_identical, run
from peft import LoraConfig, get_peft_model
from stacks_cases import build_stack, images
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from register_adapter import add_registers, capture, find_register_layer, find_tower
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


#: transformers 4 calls its blocks with keywords alone, which PEFT's wrapper of a saved module cannot be.
_MLCD = () if tf.__version__.startswith("4.") else ("mlcd-vision",)


def second_block(base: nn.Module) -> str:
    return next(path for path, part in base.named_modules() if part is find_tower(base).part("blocks")[1])


@pytest.mark.parametrize("owner", ["registers", "LoRA"])
@pytest.mark.parametrize("options", [{"insert_layer": 1}, {"deep": True}, {}], ids=str)
@pytest.mark.parametrize("name", [name for name in ("vit", "dinov3", "beit", *_MLCD) if name in CASES])
def test_a_block_that_is_saved_as_a_whole_has_hooks_once(name: str, options: dict[str, Any], owner: str) -> None:
    """PEFT's copy of it has the hooks of a copy of the registers, which must not put theirs in."""
    model, inputs = add_registers(build(name), 3, **options).eval(), make_inputs(name)
    base = build(name)
    block = second_block(base)
    saved: Any = model
    if owner == "LoRA":
        saved = get_peft_model(
            copy.deepcopy(model), LoraConfig(target_modules=["k_proj", "key"], modules_to_save=[block])
        )
    else:
        saved = add_registers(base, 3, modules_to_save=[block], **options)
    with torch.no_grad():
        weights = find_register_layer(model).tokens("default").weight.normal_()
        find_register_layer(saved).tokens("default").weight.copy_(weights)
    assert_identical(run(saved.eval(), inputs), run(model, inputs))


@pytest.mark.parametrize("options", [{}, {"key_value": True}], ids=str)
def test_attention_maps_of_a_block_that_is_saved_as_a_whole(options: dict[str, Any]) -> None:
    """PEFT's copy of it has a copy of the config that names the attention."""
    inputs = make_inputs("vit-classifier")
    maps = []
    for heads in (None, [second_block(build("vit-classifier"))]):
        torch.manual_seed(0)
        model = add_registers(build("vit-classifier"), 3, modules_to_save=heads, **options).eval()
        with capture(model) as trace:
            model(**inputs)
        maps.append(dict(enumerate(trace.attentions)))
        assert model(**inputs).attentions is None
    assert_identical(maps[1], maps[0])
