"""Training that begins in the middle: the same outputs and gradients, and a word where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from safetensors.torch import load_file
from torch import nn
from training_cases import flags, start, stopped, write_case
from training_helpers import write_vit

from register_adapter import add_registers, find_tower
from register_adapter.features.layout import tower_of
from register_adapter.features.passes import keep_layer
from register_adapter.features.prefix import check_prefix, continued_from
from register_adapter.training.moving import Moving, put_on
from register_adapter.training.objectives.tokens import prefix_key, read_base, read_tokens
from register_adapter.tuner.hooks.attention import reads_implementation

NAMES = ["vit", "dinov2", "clip-vision", "siglip-vision", "beit", "deit", "dinov3"]
MODES: list[dict[str, Any]] = [{}, {"deep": True}, {"key_value": True}, {"gate": -1.0}]


def pixels(name: str) -> torch.Tensor:
    values: torch.Tensor = make_inputs(name)["pixel_values"]
    return values


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_pass_that_begins_at_a_block_gives_the_same_tokens_and_gradients(name: str, options: dict[str, Any]) -> None:
    base = build(name)
    if ({"key_value", "gate"} & set(options)) and not reads_implementation(find_tower(base)):
        pytest.skip(f"{name} does not go through the attention interface in this version of transformers")
    block = len(find_tower(base).part("blocks")) - 1
    model = add_registers(base, 2, insert_layer=block, init_std=1.0, **options).train()
    tower, layer = tower_of(model)
    check_prefix(tower, layer, block)
    batch = {"pixel_values": pixels(name)}
    with keep_layer(tower, block) as kept:
        read_base(model, batch)
    ran: list[int] = []
    handles = [part.register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n, part in enumerate(mlps(tower))]
    results = []
    for given in (batch, {**batch, prefix_key(block): kept[0]}):
        ran.clear()
        patches = read_tokens(model.eval(), given).patches
        patches.square().sum().backward()
        weight = next(value for value in model.parameters() if value.requires_grad)
        assert weight.grad is not None
        results.append((patches.detach(), weight.grad.clone()))
        weight.grad = None
    for handle in handles:
        handle.remove()
    assert ran == [block]
    for whole, part in zip(*results, strict=True):
        torch.testing.assert_close(part, whole)
    assert not any("forward" in vars(part) for part in tower.part("blocks"))


def mlps(tower: Any) -> list[nn.Module]:
    """A module inside every block, which runs only if its block does."""
    return [tower.block_part(index, "mlp_in") for index in range(len(tower.part("blocks")))]


def test_blocks_are_as_before_after_an_error() -> None:
    tower = find_tower(build("vit"))
    own = tower.part("blocks")[0].forward
    with pytest.raises(RuntimeError, match="stop"), continued_from(tower, 1, torch.zeros(1)):
        raise RuntimeError("stop")
    assert tower.part("blocks")[0].forward == own


@pytest.mark.parametrize(
    ("moving", "options", "message"),
    [
        ("registers", {}, "registers take part from block 0 on, .* train with --insert-layer 1"),
        ("registers+lora", {"insert_layer": 1}, r"layers?\.0\..*lora.* is trained and comes before block 1"),
        ("registers+patch_embedding", {"insert_layer": 1}, "embeddings.* is trained and comes before block 1"),
        ("registers+norms", {"insert_layer": 1}, "is trained and comes before block 1"),
    ],
)
def test_what_changes_before_the_block_is_refused_by_name(moving: str, options: dict[str, Any], message: str) -> None:
    tower, layer = tower_of(put_on(build("vit"), Moving.parse(moving), options))
    with pytest.raises(ValueError, match=message):
        check_prefix(tower, layer, 1)
    late, layer = tower_of(put_on(build("vit"), Moving.parse("registers+last_blocks=1"), {"insert_layer": 1}))
    check_prefix(late, layer, 1)
    with pytest.raises(ValueError, match="before the blocks 1 to 1, got 2"):
        check_prefix(late, layer, 2)


@pytest.mark.slow
def test_a_run_with_a_stored_prefix_learns_what_one_without_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = write_case(tmp_path / "case")
    write_vit(case / "vit", ["a", "b"], dropout=0.0)  # what is stored has none
    given = ("--objective", "distillation", "--num-views", "2", "--insert-layer", "1", "--max-train-steps", "3")
    given += ("--per-device-train-batch-size", "4", "--learning-rate", "0.02", "--quiet")
    store = ("--target-store", str(tmp_path / "store"), "--target-dtype", "float32")
    start(flags(case, tmp_path / "without", *given))
    for name in ("first", "again"):
        start(flags(case, tmp_path / name, *given, *store, "--cache-prefix", "1"))
    values = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("without", "first", "again")]
    for key, value in values[0].items():
        torch.testing.assert_close(values[1][key], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(values[2][key], values[1][key])
    assert stopped(flags(case, tmp_path / "other", *given, *store)) == 1
    assert "prefix" in capsys.readouterr().err
    assert stopped(flags(case, tmp_path / "other", *given, "--cache-prefix", "1")) == 2
    assert "cache_prefix needs target_store" in capsys.readouterr().err
