"""What PEFT's users call on LoRA: it works, or is refused in words, and nothing has changed then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build, make_inputs
from helpers import assert_identical, run
from peft import LoraConfig, VBLoRAConfig

from register_adapter import RegisterConfig, add_registers, compose, load_adapters

QUERY = ["q_proj", "query"]


def test_no_weighted_sum() -> None:
    model = add_registers(build("vit"), init_std=1.0)
    model.add_adapter("more", RegisterConfig())
    before = run(model.eval(), make_inputs("vit"))
    with pytest.raises(NotImplementedError, match="registers are tokens, not weight deltas"):
        model.add_weighted_adapter(["default", "more"], [0.5, 0.5], "sum")
    composed = compose(model, {"lora": LoraConfig(target_modules=QUERY)}).eval()
    with pytest.raises(NotImplementedError, match="several methods"):
        composed.add_weighted_adapter(["lora"], [0.5], "sum")
    assert set(composed.peft_config) == {"default", "more", "lora"}
    assert_identical(run(composed, make_inputs("vit")), before)


def test_a_bank_that_layers_share(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bank = VBLoRAConfig(target_modules=QUERY, num_vectors=8, vector_length=4, topk=2, init_logits_std=1.0)
    model = compose(build("vit"), {"registers": RegisterConfig(), "bank": bank})
    for name, value in model.named_parameters():
        if "vblora" in name:
            torch.nn.init.normal_(value)
    expected = run(model.eval(), make_inputs("vit"))
    model.save_pretrained(tmp_path)
    assert_identical(run(load_adapters(build("vit"), tmp_path).eval(), make_inputs("vit")), expected)


def test_blocks_that_lora_repeats() -> None:
    base = build("vit")
    before = run(base, make_inputs("vit"))
    repeated = LoraConfig(target_modules=QUERY, layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(ValueError, match="has layer_replication"):
        compose(base, {"registers": RegisterConfig(), "lora": repeated})
    assert_identical(run(base, make_inputs("vit")), before)
