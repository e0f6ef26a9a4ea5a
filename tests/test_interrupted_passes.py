"""Ctrl-C in a pass, or in blocks that a backward pass computes again: the next pass knows nothing of it.

Behind anything but an ``Exception`` torch calls no hook, not even those that are always called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from families import build, make_inputs
from stacks_cases import STACKS, build_stack, images, timm
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import ViTConfig, ViTModel

from register_adapter import add_registers, find_tower

MODES: list[dict[str, Any]] = [{"insert_layer": 1}, {"deep": True}, {"register_neurons": {1: [3, 5]}}]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _model(**options: Any) -> Any:
    torch.manual_seed(0)
    base = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0
    )
    return add_registers(base, 2, init_std=1.0, **options)


@contextmanager
def _interrupted(module: torch.nn.Module) -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(interrupt)
    with suppress(KeyboardInterrupt):
        yield
        pytest.fail("nothing was interrupted")
    handle.remove()


@pytest.mark.parametrize("options", MODES)
def test_backward_pass(options: dict[str, Any]) -> None:
    model = _model(**options).train()
    base = model.get_base_model()
    expected = base.forward_features(IMAGES)
    base.set_grad_checkpointing(True)
    loss = model(IMAGES).sum()
    with _interrupted(base.blocks[2].mlp):
        loss.backward()
    torch.testing.assert_close(base.forward_features(IMAGES), expected)


@pytest.mark.parametrize("method", ["forward_features", "get_intermediate_layers"])
@pytest.mark.parametrize("options", MODES)
def test_forward_pass(options: dict[str, Any], method: str) -> None:
    model = _model(**options).eval()
    call = getattr(model.get_base_model(), method)
    with model.disable_adapter():
        expected = call(IMAGES)
    with _interrupted(model.get_base_model().blocks[2].mlp):
        model(IMAGES)
    with model.disable_adapter():
        torch.testing.assert_close(call(IMAGES), expected, rtol=0, atol=0)


def _gradients(model: Any, run: Any) -> list[torch.Tensor]:
    run(model).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_wrapped_blocks_that_are_computed_again_reentrantly() -> None:
    def model() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = ViTConfig(**sizes, image_size=32, patch_size=8, hidden_dropout_prob=0.0)
        return add_registers(ViTModel(config), 2, init_std=1.0, key_value=True).train()

    def wrap(module: torch.nn.Module) -> torch.nn.Module:
        return checkpoint_wrapper(module, checkpoint_impl=CheckpointImpl.REENTRANT)

    wrapped = model()
    apply_activation_checkpointing(
        wrapped, checkpoint_wrapper_fn=wrap, check_fn=lambda module: type(module).__name__ == "ViTLayer"
    )
    run = lambda each: each(pixel_values=IMAGES).last_hidden_state  # noqa: E731
    torch.testing.assert_close(_gradients(wrapped, run), _gradients(model(), run))


def test_timm_blocks_that_are_computed_again_reentrantly() -> None:
    config = pytest.importorskip("timm.layers.config")
    if not hasattr(config, "set_reentrant_ckpt"):
        pytest.skip("this timm has no such setting")
    expected = _gradients(_model(insert_layer=1).train(), lambda model: model(IMAGES))
    model = _model(insert_layer=1).train()
    model.get_base_model().set_grad_checkpointing(True)
    config.set_reentrant_ckpt(True)
    try:
        torch.testing.assert_close(_gradients(model, lambda each: each(IMAGES)), expected)
    finally:
        config.set_reentrant_ckpt(False)


OPTIONS: list[dict[str, Any]] = [{}, *MODES]
WAYS = [
    (family, options) for family in ("vit", "dinov2") for options in (*OPTIONS, {"key_value": True}, {"gate": -1.0})
]
WAYS += [
    (f, options) for f in ("timm", "eva", "open_clip", "open_clip-whole", "torchvision", "hub") for options in OPTIONS
]


def _parts_alone(model: Any) -> list[torch.Tensor]:
    """What embeddings, blocks, and the place where registers leave make of a sequence, each called by itself."""
    tower = find_tower(model)
    tokens = torch.randn(2, 9, tower.hidden_size, generator=torch.Generator().manual_seed(1))
    names = ["remove", *(["embeddings"] if tower.anatomy.insert_at == "input" else [])]
    results = [tower.part(name)(tokens) for name in names]
    if not tower.anatomy.rotary:
        results += [block(tokens) for block in tower.part("blocks")]
    return [result[0] if isinstance(result, tuple) else result for result in results]


@pytest.mark.parametrize(("family", "options"), WAYS, ids=str)
def test_parts_that_are_called_alone_afterwards(family: str, options: dict[str, Any]) -> None:
    base = build_stack(family) if family in STACKS else build(family)
    inputs = {"args": [images()]} if family in STACKS else {"kwargs": make_inputs(family)}
    model = add_registers(base, 2, init_std=1.0, **options).eval()
    with model.disable_adapter():
        expected = _parts_alone(base)
    with _interrupted(find_tower(base).block_part(1, "mlp_out")):
        model(*inputs.get("args", ()), **inputs.get("kwargs", {}))
    with model.disable_adapter():
        for actual, wanted in zip(_parts_alone(base), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
