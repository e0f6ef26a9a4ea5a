"""Vision transformers of a user's own, described by hand: what fits works, what does not is told in a dry run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases_base import BLOCKS, HEADS, IMAGE, LABELS, PATCH, PATCHES, WIDTH
from families import perturb
from helpers import Snapshot, assert_identical, differs, run, shapes
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from register_adapter import (
    Anatomy,
    RegisterConfig,
    UnsupportedModelError,
    add_registers,
    capture,
    find_register_layer,
    find_tower,
)


class Embed(nn.Module):
    def __init__(self, cls: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH)) if cls else None
        self.position = nn.Parameter(torch.zeros(1, PATCHES + cls, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.proj(x).flatten(2).mT
        if self.cls is not None:
            tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], dim=1)
        return tokens + self.position


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        normed = self.norm(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(tokens)


class HandWritten(nn.Module):
    """Blocks in a list, the mean of all tokens into the head; batch norm and dropout to be left as they were."""

    def __init__(self, cls: bool = True) -> None:
        super().__init__()
        self.embed_dim = WIDTH
        self.embed = Embed(cls)
        self.batch_norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)
        self.stages = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.unused, self.head = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LABELS)

    def forward(self, x: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
        tokens = self.drop(self.embed(x))
        for block in self.stages:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return {"tokens": tokens, "logits": self.head(self.batch_norm(tokens.mean(1)))}


class Stacked(HandWritten):
    """Blocks in a ``Sequential``."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(*[Block() for _ in range(BLOCKS)])


class FromEncoder(nn.Module):
    """With PyTorch's own encoder; CLS into the head."""

    def __init__(self, batch_first: bool = True, layers: int = BLOCKS) -> None:
        super().__init__()
        self.embed_dim, self.batch_first = WIDTH, batch_first
        self.embed = Embed()
        self.enter = nn.Identity()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=batch_first, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LABELS)

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        tokens = self.embed(x)
        tokens = self.enter(tokens if self.batch_first else tokens.transpose(0, 1))
        tokens = self.norm(self.encoder(tokens))
        return self.head(tokens[:, 0] if self.batch_first else tokens[0])


class Narrowing(HandWritten):
    """Every second token goes between the blocks."""

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.head(self.norm(self.stages[1](self.stages[0](self.embed(x))[:, ::2])).mean(1))


class PooledFirst(HandWritten):
    """The mean of the tokens is what the norm sees."""

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.head(self.norm(self.stages[1](self.stages[0](self.embed(x))).mean(1)))


class Measured(HandWritten):
    """Runs at one length of the sequence only."""

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        tokens = self.stages[0](self.embed(x)) * F.softmax(torch.ones(1 + PATCHES), 0)[:, None]
        return self.head(self.norm(self.stages[1](tokens)).mean(1))


class Stolen(HandWritten):
    """What the last block returns goes out as well."""

    def forward(self, x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.stages[1](self.stages[0](self.embed(x)))
        return self.norm(tokens), tokens.flatten(1)


SHAPE = (3, IMAGE, IMAGE)
MINE: dict[str, Any] = {"embeddings": "embed", "remove": "norm", "input_shape": SHAPE, "cls_token": "embed.cls"}
ATTENTION: dict[str, Any] = {"attention": "attn", "attention_maps": "weights", "final_norm": "norm"}
MODELS: dict[str, tuple[Any, Anatomy]] = {
    "hand-written": (HandWritten, Anatomy("mine", **MINE, **ATTENTION)),
    "no-cls": (lambda: HandWritten(cls=False), Anatomy("mine", **{**MINE, **ATTENTION, "cls_token": None}, prefix=0)),
    "sequential": (Stacked, Anatomy("mine", **MINE, **ATTENTION)),
    "encoder": (FromEncoder, Anatomy("mine", **MINE, **{**ATTENTION, "attention": "self_attn"})),
    "encoder-output": (
        FromEncoder,
        Anatomy(
            "mine",
            **{**MINE, **ATTENTION, "embeddings": "encoder", "attention": "self_attn", "remove": "encoder"},
            insert_at="input",
            remove_from="output",
        ),
    ),
}
MODES: dict[str, dict[str, Any]] = {"input": {}, "late": {"insert_layer": 1}, "deep": {"deep": True}}


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    perturb(model)
    return model.eval().requires_grad_(False)


def images() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))}


def attach(name: str, mode: str = "input") -> Any:
    return add_registers(build(name), 3, anatomy=MODELS[name][1], init_std=1.0, **MODES[mode]).eval()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_two_names_are_enough(name: str, mode: str) -> None:
    expected = run(build(name), images())
    model = attach(name, mode)
    outputs = run(model, images())
    assert shapes(outputs) == shapes(expected)
    assert differs(outputs, expected)
    with model.disable_adapter():
        for key, value in run(model, images()).items():
            # With hooks on its layers nn.TransformerEncoderLayer takes its slow path, which rounds otherwise.
            tolerance = 1e-5 if mode != "input" and "encoder" in name else 0
            torch.testing.assert_close(value, expected[key], rtol=0, atol=tolerance)
    assert find_register_layer(model).tower.part("blocks") is not None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_only_registers_learn(name: str, mode: str) -> None:
    model = attach(name, mode).train()
    output = model(**images())
    (output["logits"] if isinstance(output, dict) else output).square().sum().backward()
    with_grad = [key for key, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_grad == [key for key, _ in model.named_parameters() if "register_adapter_tokens" in key]
    assert (find_register_layer(model).tokens("default").weight.grad != 0).any(-1).all()


@pytest.mark.parametrize("name", MODELS)
def test_unload_gives_back_the_very_base(name: str) -> None:
    base = build(name)
    snapshot = Snapshot(base, images())
    assert add_registers(base, 3, anatomy=MODELS[name][1]).unload() is base
    snapshot.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_the_anatomy_is_saved_with_the_adapter(name: str, mode: str, tmp_path: Path) -> None:
    model = attach(name, mode)
    model.save_pretrained(tmp_path)
    saved = RegisterConfig.from_pretrained(str(tmp_path)).anatomy
    assert saved == MODELS[name][1]
    loaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert_identical(run(loaded, images()), run(model, images()))
    other = copy.deepcopy(loaded)
    with torch.no_grad():
        find_register_layer(other).tokens("default").weight.add_(1.0)
    assert_identical(run(loaded, images()), run(model, images()))


@pytest.mark.parametrize("name", MODELS)
def test_capture(name: str) -> None:
    model, prefix = attach(name), MODELS[name][1].prefix
    with torch.no_grad(), capture(model) as trace:
        model(**images())
    length = prefix + 3 + PATCHES
    assert [tuple(hidden.shape) for hidden in trace.hidden_states] == [(2, length, WIDTH)] * (BLOCKS + 1)
    for attention in trace.attentions:
        assert attention.shape == (2, HEADS, length, length)
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, HEADS, length))
    assert trace.registers.shape == (2, 3, WIDTH)


def test_several_adapters_and_a_model_in_a_model() -> None:
    outer = nn.ModuleDict({"vision": build("hand-written"), "text": nn.Linear(3, 3)})
    model = add_registers(outer, 3, anatomy=MODELS["hand-written"][1], target_modules="vision", init_std=1.0)
    model.add_adapter(
        "late",
        RegisterConfig(num_registers=2, anatomy=MODELS["hand-written"][1], target_modules="vision", insert_layer=1),
    )
    model.base_model.set_adapter(["default", "late"])
    layer = find_register_layer(model.eval())
    assert layer.names == ["default", "late"]
    assert layer.num_active == 5
    expected = run(build("hand-written"), images())
    assert shapes(run(outer["vision"], images())) == shapes(expected)
    model.delete_adapter("late")
    model.unload()
    assert_identical(run(outer["vision"], images()), expected)


class NoPositions(HandWritten):
    """Runs at any size."""

    def __init__(self) -> None:
        super().__init__()
        del self.embed.position
        self.embed.register_buffer("position", torch.zeros(()))


@pytest.mark.parametrize(("make", "position"), [(HandWritten, "embed.position"), (NoPositions, None)])
def test_the_size_of_an_input_is_derived_where_parts_tell_it(make: Any, position: str | None) -> None:
    options: dict[str, Any] = {"patch_embedding": "embed.proj", "position_embedding": position}
    base = make().eval()
    expected = run(base, images())
    model = add_registers(base, 3, anatomy=Anatomy("mine", "embed", remove="norm", **options)).eval()
    assert shapes(run(model, images())) == shapes(expected)


def test_the_blocks_are_the_longest_list_of_one_class() -> None:
    for name, path in (("hand-written", "stages"), ("sequential", "stages"), ("encoder", "encoder.layers")):
        assert find_tower(build(name), anatomy=MODELS[name][1]).anatomy.blocks == path


MISFITS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no such embeddings": (
        HandWritten,
        {"embeddings": "embeddings"},
        r"nothing at \{'embeddings': 'embeddings'\}.*'embed'",
    ),
    "no such method": (HandWritten, {"methods": ("extract",)}, r"nothing at \{'methods': \('extract',\)\}"),
    "embeddings are an image": (HandWritten, {"embeddings": "embed.proj"}, r"'embed\.proj'.*found \(2, 32, 4, 4\)"),
    "embeddings come last": (HandWritten, {"embeddings": "norm", "remove": "stages.0"}, "in this order"),
    "embeddings not used": (HandWritten, {"embeddings": "unused"}, r"does not go through embeddings \('unused'\)"),
    "remove not used": (HandWritten, {"remove": "unused"}, r"does not go through remove \('unused'\)"),
    "remove after pooling": (HandWritten, {"remove": "head"}, r"\(2, 17, 32\).*another at \{'remove': \(2, 32\)\}"),
    "remove before the last block": (
        HandWritten,
        {"remove": "stages.0", "remove_from": "output"},
        "comes to embeddings, block 0, remove, block 1 in this order",
    ),
    "remove inside a block": (HandWritten, {"remove": "stages.1.norm"}, "with 3 registers .* it does not run"),
    "pooled before the norm": (PooledFirst, {}, r"another at \{'remove': \(2, 32\)\}"),
    "prefix": (HandWritten, {"prefix": 17}, r"more than 17 tokens, 32\) was expected, found \(2, 17, 32\)"),
    "hidden size": (HandWritten, {"hidden_size": 48}, r"tokens, 48\) was expected, found \(2, 17, 32\)"),
    "batch second": (
        lambda: FromEncoder(batch_first=False),
        {"embeddings": "enter"},
        r"found \(17, 2, 32\)\..*batch second",
    ),
    "size unknown": (
        HandWritten,
        {"input_shape": None},
        r"do not tell the size of an input.*input_shape=\(3, 224, 224\)",
    ),
    "size wrong": (
        HandWritten,
        {"input_shape": (3, 40, 40)},
        r"does not run on an input of shape \(3, 40, 40\) \(input_shape=\): RuntimeError",
    ),
    "tokens dropped": (Narrowing, {}, r"another at \{'block 1': \(2, 9, 32\)"),
    "one length only": (Measured, {}, "with 3 registers in the sequence it does not run: RuntimeError"),
    "read by others": (
        Stolen,
        {},
        r"with registers its outputs have the shapes .*640.*without .*544.*'remove' is 'norm'",
    ),
    "key_value": (HandWritten, {}, "key_value needs a model whose attention.*HandWritten"),
    "gate": (HandWritten, {}, "gate needs a model whose attention.*HandWritten"),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_told_and_nothing_is_changed(misfit: str, training: bool) -> None:
    make, changes, match = MISFITS[misfit]
    base = make().eval()
    snapshot = Snapshot(base, images())
    base.train(training)
    if training:
        base.norm.eval()  # a mode of its own
    modes, state = [module.training for module in base.modules()], torch.get_rng_state()
    options = {"key_value": {"key_value": True}, "gate": {"gate": -1.0}}.get(misfit, {})
    with pytest.raises(UnsupportedModelError, match=match):
        add_registers(base, 3, anatomy=Anatomy("mine", **{**MINE, **changes}), **options)
    assert [module.training for module in base.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    base.eval()
    snapshot.check()


def test_the_dry_run_draws_no_random_numbers_and_updates_no_statistics() -> None:
    base = build("hand-written").train()
    statistics = {key: value.clone() for key, value in base.batch_norm.state_dict().items()}
    torch.manual_seed(3)
    model = add_registers(base, 3, anatomy=MODELS["hand-written"][1])
    assert_identical(dict(base.batch_norm.state_dict()), statistics)
    torch.manual_seed(3)
    assert torch.equal(find_register_layer(model).tokens("default").weight, torch.randn(3, WIDTH) * 0.02)


def test_the_hidden_size_must_be_said_where_nothing_tells_it() -> None:
    base = build("hand-written")
    del base.embed_dim
    with pytest.raises(UnsupportedModelError, match=r"cannot tell the hidden size of HandWritten.*hidden_size="):
        add_registers(base, 3, anatomy=MODELS["hand-written"][1])
    model = add_registers(base, 3, anatomy=Anatomy("mine", **MINE, hidden_size=WIDTH)).eval()
    assert shapes(run(model, images())) == shapes(run(base, images()))


def test_a_model_on_the_meta_device_is_not_run() -> None:
    with torch.device("meta"):
        base = HandWritten()
    model = add_registers(base, 3, anatomy=MODELS["hand-written"][1])
    assert find_register_layer(model).names == ["default"]
