"""What messages and cards say of loading an adapter works for the kind of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import build
from peft import AutoPeftModel, PeftModel
from stacks_cases import build_stack

from register_adapter import add_registers
from register_adapter.commands.runs.fit import how_to_load
from register_adapter.utils.parameters import check_module

BUILT = {"timm": "timm.create_model(", "open_clip-whole": "open_clip.create_model(", "torchvision": "models.get_model("}


@pytest.mark.parametrize("name", [*BUILT, "vit"])
def test_a_card(name: str, tmp_path: Path) -> None:
    base: Any = build(name) if name == "vit" else build_stack(name)
    add_registers(base, 2).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert BUILT.get(name, "ViTModel.from_pretrained(") in card
    code = card[card.index("import register_adapter") : card.index("model.eval()")]
    compile(code, "the card", "exec")
    assert "AutoPeftModel" not in code
    assert name == "vit" or f"import {name.partition('-')[0]}\n" in code


def test_the_fits_last_words() -> None:
    for name in ("hf-hub:user/clip", "local-dir:clip"):
        said = how_to_load(name, "out")
        assert f"open_clip.create_model_and_transforms({name!r}" in said
        assert "PeftModel.from_pretrained(base, 'out')" in said
        assert "AutoPeftModel" not in said
    assert "AutoPeftModel.from_pretrained('out')" in how_to_load("user/vit", "out")


def test_a_name_in_the_place_of_a_model() -> None:
    with pytest.raises(TypeError, match=r"AutoModel.from_pretrained\(...\), timm.create_model"):
        check_module("vit")


def test_what_autopeft_refuses_loads_onto_a_base(tmp_path: Path) -> None:
    add_registers(build_stack("timm"), 2).save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"allowlist|from_pretrained|base_model"):
        AutoPeftModel.from_pretrained(tmp_path)
    assert PeftModel.from_pretrained(build_stack("timm"), tmp_path).active_adapters == ["default"]
