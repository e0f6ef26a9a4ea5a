"""Models with registers and the gradients they get: what the tests of execution modes share with their scripts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import HEADS, IMAGE, PATCH, build, make_inputs
from helpers import run
from peft import PeftModel
from torch import nn

from register_adapter import add_registers, find_tower
from register_adapter.tuner.hooks.attention import reads_implementation

#: Ways for registers to enter.
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "insert_layer": {"insert_layer": 1},
    "deep": {"deep": True},
    "key_value": {"key_value": True},
    "gate": {"gate": -1.0},
    "neurons": {"register_neurons": {0: [0, 3, 7], 1: [5]}, "train_removal": True},
}
#: What two processes train.
SHARDED = [(name, way) for name in ("vit", "dinov3") for way in WAYS]


def registered(name: str, way: str, base: Any = None) -> Any:
    """The model ``name`` with three large registers, the same values at every call, in evaluation mode.

    A test is skipped where the model refuses the way.
    """
    base = build(name) if base is None else base
    if way in ("key_value", "gate") and not reads_implementation(find_tower(base)):
        pytest.skip(f"{name} does not go through the attention interface in this version of transformers")
    torch.manual_seed(0)
    return add_registers(base, 3, init_std=1.0, **WAYS[way]).eval()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def short(name: str) -> str:
    """The name of a register parameter without the model around it, which wrappers rename."""
    return name.rpartition("register_adapter_tokens.")[2].replace("_fsdp_wrapped_module.", "")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {short(name): value for name, value in model.named_parameters() if value.requires_grad}


def trained_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters, whole."""
    return {name: whole(value) for name, value in trained(model).items()}


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their gradients after one backward pass of a mean over the batch, whole."""
    model.zero_grad()
    model(**inputs).last_hidden_state.square().mean().backward()
    return {name: whole(value.grad) for name, value in trained(model).items()}


#: Quantisers of bitsandbytes.
BITS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}


def check_bitsandbytes(way: str, options: dict[str, Any], device: str, folder: Path) -> None:
    """An adapter saved on the float base loads on the quantised one, trains, and is as near as the base alone."""
    pytest.importorskip("bitsandbytes", minversion="0.49", reason="its first release for CPUs that this was tried on")
    # Four-bit weights come in blocks of 64 numbers of a row.
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    base, inputs = tf.ViTModel(tf.ViTConfig(**shape, image_size=IMAGE, patch_size=PATCH)).eval(), make_inputs("vit")
    base.save_pretrained(folder / "base")
    model = registered("vit", way, copy.deepcopy(base))
    model.save_pretrained(folder / "adapter")
    quantised = tf.AutoModel.from_pretrained(
        folder / "base", quantization_config=tf.BitsAndBytesConfig(**options), device_map=device
    )
    there = {key: value.to(device) for key, value in inputs.items()}
    loaded = PeftModel.from_pretrained(quantised, folder / "adapter", is_trainable=True)
    # Trained first: bitsandbytes packs four-bit weights for a CPU at the first pass in evaluation mode, for good.
    for value in gradients(loaded.train(), there).values():
        assert torch.isfinite(value).all()
        assert value.abs().sum() > 0
    output = run(loaded.eval(), there)["last_hidden_state"].float().cpu()
    with loaded.disable_adapter():
        plain = run(loaded, there)["last_hidden_state"].float().cpu()

    def error(got: torch.Tensor, expected: torch.Tensor) -> float:
        return float((got - expected).norm() / expected.norm())

    limit = 2 * error(plain, run(base, inputs)["last_hidden_state"])
    assert 0 < error(output, run(model, inputs)["last_hidden_state"]) < limit
    assert error(output, plain) > 0
