"""Vision transformers outside transformers: everything that users call on them, with registers and after them."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases_base import BLOCKS, HEADS, IMAGE, PATCHES, WIDTH
from crossings import crossings
from helpers import assert_identical, differs, run, shapes
from hub_dinov2 import DinoVisionTransformer
from peft import LoraConfig, PeftModel, get_peft_model
from stacks_cases import (
    CALLS,
    DYNAMIC,
    STACKS,
    PlainSnapshot,
    build_stack,
    call,
    clip_visual,
    images,
    timm,
    timm_eva,
    timm_vit,
    tower_of,
)
from torch import nn

from register_adapter import (
    RegisterConfig,
    RegisterPeftModel,
    UnsupportedModelError,
    add_registers,
    capture,
    find_register_layer,
    find_tower,
)

R = 3
MODES: dict[str, dict[str, Any]] = {"input": {}, "late": {"insert_layer": 1}, "deep": {"deep": True}}
#: Calls that end before the second block, where registers of the mode "late" enter.
EARLY = ("intermediates-early", "layers-reshape", "clip-intermediates-early", "hub-layers-class")
#: One model a kind of hook: what does not depend on pooling or on the kind of MLP is tested on these.
ONE_EACH = (
    *("timm", "timm-no-class", "timm-registers-embedded", "deit-distilled", "eva02", "dinov3-timm", "features_only"),
    *("open_clip", "open_clip-custom-blocks", "open_clip-whole", "open_clip-timm", "torchvision", "hub-registers"),
    "timm-wrapper",
)

#: What a compiler goes through of these is what it goes through of another of them.
SAME_GRAPH = (
    "timm-no-class",
    "timm-registers-embedded",
    "deit-distilled",
    "open_clip-custom-blocks",
    "open_clip-whole",
    "timm-wrapper",
)


def attach(name: str, mode: str = "input", **options: Any) -> Any:
    return add_registers(build_stack(name), **{"num_registers": R, "init_std": 1.0, **MODES[mode], **options}).eval()


def first_call(name: str) -> str:
    return STACKS[name].calls[0]


def registers_of(model: nn.Module) -> torch.Tensor:
    return find_register_layer(model).tokens("default").weight.detach()


def without(value: torch.Tensor, start: int, patches: int) -> torch.Tensor:
    """A sequence, or its prefix, without the ``R`` tokens at ``start``; any other tensor as it is."""
    if value.ndim == 3 and value.shape[1] in (start + R, start + R + patches):
        return torch.cat([value[:, :start], value[:, start + R :]], dim=1)
    return value


# Shapes


@pytest.mark.parametrize("name", STACKS)
def test_the_table_knows_the_tower(name: str) -> None:
    tower = find_tower(build_stack(name))
    assert (tower.anatomy.family, tower.path, tower.prefix) == (
        STACKS[name].family,
        STACKS[name].tower,
        STACKS[name].prefix,
    )
    assert (tower.hidden_size, tower.patch_size, len(tower.part("blocks"))) == (WIDTH, 8, BLOCKS)
    assert tower.image_size in (IMAGE, (IMAGE, IMAGE))  # what segmentation and depth make images of
    for field in ("mlp_in", "mlp_out"):
        if name != "timm-parallel":  # its MLP shares a layer with the attention
            assert isinstance(tower.block_part(0, field), nn.Linear), field


@pytest.mark.parametrize(("name", "mode"), crossings(STACKS, MODES, whole=ONE_EACH))
def test_every_call_returns_what_the_base_returns_in_shape(name: str, mode: str) -> None:
    base, model = build_stack(name), attach(name, mode)
    for kind in STACKS[name].calls:
        expected, outputs = call(kind, base, images()), call(kind, model, images())
        assert shapes(outputs) == shapes(expected), kind
        assert differs(outputs, expected) != (mode == "late" and kind in EARLY), kind


@pytest.mark.parametrize(("name", "mode"), crossings(STACKS, MODES, whole=ONE_EACH))
def test_every_call_without_the_adapter_is_the_base_bit_for_bit(name: str, mode: str) -> None:
    base, model = build_stack(name), attach(name, mode)
    for kind in STACKS[name].calls:
        with model.disable_adapter():
            assert_identical(call(kind, model, images()), call(kind, base, images()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DYNAMIC)
def test_other_sizes_of_images(name: str, mode: str) -> None:
    model = attach(name, mode)
    for size in (64, (48, 16)):
        for kind in STACKS[name].calls:
            if kind != "masks":
                outputs = call(kind, model, images(size))
                assert shapes(outputs) == shapes(call(kind, build_stack(name), images(size))), (kind, size)


@pytest.mark.parametrize("name", ["timm", "dinov3-timm", "open_clip", "hub", "torchvision"])
def test_two_adapters_that_enter_at_different_blocks(name: str) -> None:
    model = attach(name)
    model.add_adapter("late", RegisterConfig(num_registers=2, init_std=1.0, insert_layer=1))
    model.base_model.set_adapter(["default", "late"])
    alone = attach(name)
    for kind in STACKS[name].calls:
        outputs = call(kind, model, images())
        assert shapes(outputs) == shapes(call(kind, build_stack(name), images()))
    assert differs(call(first_call(name), model, images()), call(first_call(name), alone, images()))


# Exactness


def native(name: str) -> tuple[Any, Any]:
    """A model with ``R`` more registers of its own, and one with the same values as an adapter."""
    stack, base = STACKS[name], build_stack(name)
    model, other = attach(name), stack.make(R).eval().requires_grad_(False)
    state, key = base.state_dict(), stack.native
    values = registers_of(model).unsqueeze(0)
    state[key] = torch.cat([state[key], values], dim=1) if key in state else values
    for position in [k for k in state if k.endswith("pos_embed")]:
        missing = other.state_dict()[position].shape[1] - state[position].shape[1]
        zeros = state[position].new_zeros(1, missing, WIDTH)
        state[position] = torch.cat([state[position][:, : stack.prefix], zeros, state[position][:, stack.prefix :]], 1)
    other.load_state_dict(state)
    return model, other


NATIVE = [name for name, stack in STACKS.items() if stack.native and name != "deit-distilled"]


@pytest.mark.parametrize("name", NATIVE)
def test_every_call_gives_what_the_same_registers_give_natively(name: str) -> None:
    """The library's own registers, with the adapter's values, are the oracle: equal to the last bit."""
    model, other = native(name)
    sizes = (32, 64, (48, 16)) if name in DYNAMIC else (32,)
    for kind, size in itertools.product(STACKS[name].calls, sizes):
        if kind == "masks" and size != 32:
            continue
        x = images(size)
        patches = x.shape[-1] * x.shape[-2] // 64
        expected = call(kind, other, x)
        if "x_norm_regtokens" in expected:
            own = expected["x_norm_regtokens"][:, : STACKS[name].prefix - 1]
            expected["x_norm_regtokens"] = own
        if STACKS[name].prefix == 0:  # a model without prefix tokens does not return any
            pairs = [key for key in expected if expected[key].shape[1] == R]
            expected = {key: value for key, value in expected.items() if key not in pairs}
        expected = {key: without(value, STACKS[name].prefix, patches) for key, value in expected.items()}
        outputs = call(kind, model, x)
        assert len(outputs) == len(expected)
        for (key, value), reference in zip(outputs.items(), expected.values(), strict=True):
            assert torch.equal(value, reference), f"{kind}, {key} at {size}: {(value - reference).abs().max()}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, "intermediates-prefix-nlc")
        for name in ("timm", "timm-registers", "deit-distilled", "eva02", "dinov3-timm")
    ]
    + [("open_clip", "clip-intermediates-nlc"), ("hub", "hub-layers"), ("hub-registers", "hub-layers")],
)
def test_intermediates_are_what_the_blocks_return_in_a_forward_pass(name: str, kind: str, mode: str) -> None:
    model = attach(name, mode)
    with torch.no_grad(), capture(model, attentions=False) as trace:
        model(images())
    norm = {"open_clip": "ln_post", "hub": "norm", "hub-registers": "norm"}.get(name)
    finish = getattr(build_stack(name), norm) if norm else lambda tokens: tokens
    outputs = list(call(kind, model, images()).values())
    patches = [value for value in outputs if value.ndim == 3 and value.shape[1] == PATCHES]
    prefixes = [value for value in outputs if value.ndim == 3 and value.shape[1] == trace.prefix]
    assert len(patches) == BLOCKS
    for index, value in enumerate(patches, start=1):
        assert torch.equal(value, finish(trace.patches(index)))
    for index, value in enumerate(prefixes, start=1):
        assert torch.equal(value, finish(trace.hidden_states[index][:, : trace.prefix]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["timm", "eva02", "open_clip", "hub"])
def test_capture_inside_a_method_sees_what_it_sees_in_a_forward_pass(name: str, mode: str) -> None:
    kind = {"hub": "hub-layers", "open_clip": "clip-intermediates"}.get(name, "intermediates-nlc")
    model = attach(name, mode)
    with torch.no_grad(), capture(model, attentions=False) as forward:
        model(images())
    with capture(model, attentions=False) as method:
        call(kind, model, images())
    for index, hidden in enumerate(forward.hidden_states):
        assert torch.equal(method.hidden_states[index], hidden)
        assert torch.equal(method.patches(index), forward.patches(index))


# Training


@pytest.mark.parametrize(("name", "mode"), crossings(STACKS, MODES, whole=ONE_EACH))
def test_only_registers_learn(name: str, mode: str) -> None:
    model = attach(name, mode).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    output = CALLS[first_call(name)](model, images())
    flat = [value for value in _tensors(output) if value.requires_grad]
    sum((value * torch.randn(value.shape)).sum() for value in flat).backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert all("register_adapter_tokens" in key for key in trained)
    assert len(trained) == 1
    grad = next(parameter.grad for parameter in model.parameters() if parameter.requires_grad)
    assert (grad.flatten(0, -2) != 0).any(-1).all()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == trained


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for item in items for tensor in _tensors(item)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm_vit(patch_drop_rate=0.5),
        lambda: timm_eva(patch_drop_rate=0.5),
        lambda: timm_eva(patch_drop_rate=0.5, rope_type="mixed"),
        lambda: clip_visual(patch_dropout=0.5),
    ],
    ids=["timm", "eva", "eva-mixed", "open_clip"],
)
def test_dropped_patches(make: Any) -> None:
    model = add_registers(make(), R, init_std=1.0).train()
    with capture(model, attentions=False) as trace:
        model(images()).sum().backward()
    assert trace.hidden_states[0].shape[1] == 1 + R + PATCHES // 2
    assert torch.equal(trace.hidden_states[0][:, 1 : 1 + R], _normed(model).expand(2, -1, -1))


def _normed(model: nn.Module) -> torch.Tensor:
    tower = find_tower(model.get_base_model())
    return tower.part("embeddings").forward(registers_of(model))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["timm", "eva02", "dinov3-timm", "open_clip", "timm-wrapper"])
def test_gradient_checkpointing_changes_no_gradient(name: str, mode: str) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = attach(name, mode).train()
        tower_of(name, model.get_base_model()).set_grad_checkpointing(checkpointing)
        _tensors(CALLS[first_call(name)](model, images()))[0].square().sum().backward()
        grads.append(next(parameter.grad for parameter in model.parameters() if parameter.requires_grad))
    assert torch.equal(*grads)


@pytest.mark.parametrize("mode", ["input", "deep"])
@pytest.mark.parametrize(("name", "kind"), [("timm", "intermediates"), ("eva02", "intermediates-nlc")])
def test_gradient_checkpointing_inside_a_method(name: str, kind: str, mode: str) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = attach(name, mode).train()
        model.get_base_model().set_grad_checkpointing(checkpointing)
        sum(tensor.square().sum() for tensor in _tensors(CALLS[kind](model, images()))).backward()
        grads.append(next(parameter.grad for parameter in model.parameters() if parameter.requires_grad))
    assert torch.equal(*grads)


def test_checkpointing_a_method_with_late_registers_is_refused() -> None:
    model = attach("timm", "late").train()
    model.get_base_model().set_grad_checkpointing(True)
    with pytest.raises(ValueError, match=r"forward_intermediates with gradient checkpointing.*insert_layer=0"):
        model.forward_intermediates(images())
    assert shapes(call("intermediates", model, images())) == shapes(
        call("intermediates", build_stack("timm"), images())
    )


# Coming and going


@pytest.mark.parametrize(("name", "mode"), crossings(ONE_EACH, MODES, whole=("timm", "eva02", "open_clip", "hub")))
def test_unload_leaves_no_trace(name: str, mode: str) -> None:
    base, kinds = build_stack(name), STACKS[name].calls
    snapshot = PlainSnapshot(tower_of(name, base), {"x": images()})
    expected = [call(kind, base, images()) for kind in kinds]
    keys = list(base.state_dict())
    model = add_registers(base, R, **MODES[mode]).eval()
    assert [key for key in base.state_dict() if "register_adapter_" not in key] == keys
    for kind in kinds:
        call(kind, model, images())
    assert model.unload() is base
    assert list(base.state_dict()) == keys
    snapshot.check()
    for kind, outputs in zip(kinds, expected, strict=True):
        assert_identical(call(kind, base, images()), outputs)


@pytest.mark.parametrize("name", ["timm", "dinov3-timm", "open_clip", "hub"])
def test_a_method_that_fails_leaves_the_tower_as_it_was(name: str) -> None:
    base = build_stack(name)
    add_registers(base, R).eval()
    method = base.get_intermediate_layers if name == "hub" else base.forward_intermediates
    method(images())
    snapshot = PlainSnapshot(base, {"x": images()})
    # The method has the registers by then, and counts them.
    broken = find_tower(base).part("blocks")[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        method(images())
    broken.remove()
    snapshot.check()


@pytest.mark.parametrize(
    ("name", "mode", "loader"), crossings(ONE_EACH, MODES, (PeftModel, RegisterPeftModel), whole=("timm",), each=2)
)
def test_save_and_load(name: str, mode: str, loader: Any, tmp_path: Path) -> None:
    model = attach(name, mode)
    model.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(build_stack(name), tmp_path).eval()
    for kind in STACKS[name].calls:
        assert_identical(call(kind, loaded, images()), call(kind, model, images()))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", [name for name in ONE_EACH if name != "timm-wrapper"])
def test_copies_are_independent(name: str, how: Any) -> None:
    model = attach(name)
    expected = {kind: call(kind, model, images()) for kind in STACKS[name].calls}
    other = how(model)
    for kind, outputs in expected.items():
        assert_identical(call(kind, other, images()), outputs)
    with torch.no_grad():
        find_register_layer(other).tokens("default").weight.add_(1.0)
    for kind, outputs in expected.items():
        assert differs(call(kind, other, images()), outputs)
        assert_identical(call(kind, model, images()), outputs)


@pytest.mark.parametrize(("name", "mode"), crossings(ONE_EACH, MODES, whole=("timm", "eva02", "open_clip", "hub")))
def test_bfloat16(name: str, mode: str) -> None:
    model = add_registers(build_stack(name, torch.bfloat16), R, **MODES[mode]).eval()
    for kind in STACKS[name].calls:
        x = images(dtype=torch.bfloat16)
        outputs, expected = call(kind, model, x), call(kind, build_stack(name, torch.bfloat16), x)
        assert shapes(outputs) == shapes(expected)
        assert [value.dtype for value in outputs.values()] == [value.dtype for value in expected.values()]


# Looking inside


@pytest.mark.parametrize(("name", "mode"), crossings(STACKS, MODES, whole=ONE_EACH))
def test_capture(name: str, mode: str) -> None:
    if name == "timm-parallel":
        pytest.skip("its blocks have no attention module")
    model, kind = attach(name, mode), first_call(name)
    expected = call(kind, model, images())
    modules = dict(model.named_modules())
    fused = {key: vars(module).get("fused_attn") for key, module in modules.items()}
    with capture(model) as trace:
        outputs = call(kind, model, images())
    for key, value in outputs.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5)
    assert {key: vars(module).get("fused_attn") for key, module in modules.items()} == fused
    assert_identical(call(kind, model, images()), expected)
    prefix = STACKS[name].prefix
    assert (trace.prefix, trace.num_registers) == (prefix, R)
    assert trace.registers.shape == (2, R, WIDTH)
    assert (len(trace.hidden_states), len(trace.attentions)) == (BLOCKS + 1, BLOCKS)
    for index, attention in enumerate(trace.attentions):
        length = prefix + (0 if mode == "late" and index == 0 else R) + PATCHES
        assert attention.shape == (2, HEADS, length, length)
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, HEADS, length))
        assert trace.hidden_states[index + 1].shape == (2, length, WIDTH)
    with model.disable_adapter(), capture(model) as plain:
        call(kind, model, images())
    assert plain.num_registers == 0
    assert plain.attentions[0].shape == (2, HEADS, prefix + PATCHES, prefix + PATCHES)


@pytest.mark.parametrize("fused", [True, False])
def test_maps_of_fused_attention_are_those_of_the_explicit_one(fused: bool) -> None:
    torch.manual_seed(0)
    models = [DinoVisionTransformer(fused=which).eval() for which in (fused, False)]
    models[1].load_state_dict(models[0].state_dict())
    maps = []
    for model in models:
        with torch.no_grad(), capture(model) as trace:
            model(images())
        maps.append(torch.stack(trace.attentions))
    torch.testing.assert_close(*maps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["timm", "eva02", "open_clip", "open_clip-custom-blocks", "hub"])
def test_an_exception_inside_capture_leaves_nothing_behind(name: str) -> None:
    base = build_stack(name)
    snapshot = PlainSnapshot(base, {"x": images()})
    attention = find_tower(base).block_part(0, "attention")
    inside = list(attention.children())[-1]
    broken = inside.register_forward_pre_hook(lambda module, args: 1 / 0)
    if isinstance(attention, nn.MultiheadAttention):  # it calls no child
        broken.remove()
        broken = attention.register_forward_hook(lambda module, args, output: 1 / 0)
    with pytest.raises(ZeroDivisionError), capture(base):
        base(images())
    broken.remove()
    assert not torch.overrides._get_current_function_mode_stack()
    snapshot.check()


# Beside other things


@pytest.mark.parametrize("name", ["timm", "eva02", "dinov3-timm"])
def test_lora_beside_registers(name: str) -> None:
    model = attach(name)
    targets = ["fc1", "fc2"] if name != "eva02" else ["fc1_g", "fc2"]
    both = get_peft_model(model.base_model.model, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    for kind in STACKS[name].calls:
        base, outputs = call(kind, build_stack(name), images()), call(kind, both, images())
        assert shapes(outputs) == shapes(base)
        assert differs(outputs, base)


def follows_dict() -> bool:
    """Whether Dynamo takes over the ``__dict__`` of a module (torch 2.15 does, 2.11 does not)."""

    class Copied:
        pass

    layer = torch.nn.Linear(2, 2)

    def width(values: torch.Tensor) -> torch.Tensor:
        copied = Copied()
        copied.__dict__.update(layer.__dict__)
        return values * copied.__dict__["in_features"]

    try:
        torch.compile(width, fullgraph=True, backend="eager")(torch.ones(2))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), crossings([name for name in ONE_EACH if name not in SAME_GRAPH], MODES))
def test_compiles_as_one_graph(name: str, mode: str) -> None:
    if (name, mode) == ("features_only", "late") and not follows_dict():
        pytest.skip("this torch follows no __dict__ of a module, from which a call of such a method makes its own")
    torch._dynamo.reset()
    model, kind = attach(name, mode), first_call(name)
    expected = call(kind, model, images())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for key, value in call(kind, compiled, images()).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5)


def test_a_new_input_size_and_a_new_head_of_timm() -> None:
    model = attach("timm")
    base = model.get_base_model()
    base.set_input_size((64, 64))
    base.reset_classifier(7, "avg")
    assert call("forward", model, images(64))[""].shape == (2, 7)
    assert call("intermediates-nlc", model, images(64))["1.0"].shape == (2, 4 * PATCHES, WIDTH)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [True, False], ids=["registers-first", "net-first"])
@pytest.mark.parametrize("name", ["timm", "dinov3-timm"])
def test_what_timm_collects_by_hooks_is_without_registers(name: str, first: bool, mode: str) -> None:
    """``features_only=True, feature_cls="hook"``: its maps had rows of registers."""

    def collecting(base: Any) -> Any:
        base.feature_info = [{"module": f"blocks.{i}", "num_chs": WIDTH, "reduction": 8} for i in range(BLOCKS)]
        return timm.models.FeatureHookNet(base, out_indices=range(BLOCKS))

    base = build_stack(name)
    plain = collecting(build_stack(name))(images())
    net = None if first else collecting(base)
    model = add_registers(base if first else net, R, init_std=1.0, **MODES[mode]).eval()
    net = collecting(base) if first else model
    with torch.no_grad():
        expected = base.forward_intermediates(
            images(), output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
        expected = [torch.cat([prefix, patches], dim=1) for patches, prefix in expected]
        torch.testing.assert_close(net(images()), expected)
        with model.disable_adapter():
            torch.testing.assert_close(net(images()), plain, rtol=0, atol=0)
        base.norm_pre.compile(backend="eager")  # where registers enter: no eager hook sees the sequence before
        torch.testing.assert_close(net(images()), expected)


# What is refused


@pytest.mark.parametrize("options", [{"key_value": True}, {"gate": -1.0}], ids=["key_value", "gate"])
@pytest.mark.parametrize("name", ONE_EACH)
def test_model_operations_that_need_transformers_attention_are_refused(name: str, options: dict[str, Any]) -> None:
    base = build_stack(name)
    snapshot = PlainSnapshot(tower_of(name, base), {"x": images()})
    kind = type(tower_of(name, base)).__name__
    with pytest.raises(UnsupportedModelError, match=f"{next(iter(options))} needs a model whose attention.*{kind}"):
        add_registers(base, R, **options)
    snapshot.check()


def _old_dinov2() -> nn.Module:
    model = DinoVisionTransformer()
    del model.num_register_tokens
    return model


def _sequence_first() -> nn.Module:
    model = clip_visual()
    model.transformer.batch_first = False
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: DinoVisionTransformer(block_chunks=1),
            "DinoVisionTransformer has chunked_blocks=True.*block_chunks=0",
        ),
        (_old_dinov2, "is a DinoVisionTransformer, but without.*num_register_tokens"),
        (_sequence_first, "VisionTransformer has transformer.batch_first=False"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformer has no vision tower"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1), "Beit has no vision tower"),
        (lambda: timm.create_model("resnet18"), "ResNet has no vision tower"),
    ],
    ids=["chunked", "old-dinov2", "sequence-first", "swin", "beit", "resnet"],
)
def test_models_without_a_place_for_registers_are_refused_by_name(make: Any, match: str) -> None:
    model = make()
    before = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=match):
        add_registers(model, R)
    assert list(model.state_dict()) == before
    assert not hasattr(model, "peft_config")


def test_a_list_of_crops_is_refused() -> None:
    model = attach("hub")
    with pytest.raises(TypeError, match="a list of 2 batches"):
        model.forward_features([images(), images(16)], [None, None])
    with model.disable_adapter():
        assert len(model.forward_features([images(), images(16)], [None, None])) == 2


def test_an_adapter_of_one_library_does_not_load_on_another(tmp_path: Path) -> None:
    attach("timm").save_pretrained(tmp_path)
    base = build_stack("torchvision")
    snapshot = PlainSnapshot(base, {"x": images()})
    with pytest.raises(Exception, match=r"timm_vit.*torchvision"):
        PeftModel.from_pretrained(base, tmp_path)
    snapshot.check()


def test_a_whole_clip_has_one_tower_and_an_adapter_that_fits_the_tower_alone(tmp_path: Path) -> None:
    model = attach("open_clip-whole")
    model.save_pretrained(tmp_path)
    visual = copy.deepcopy(build_stack("open_clip-whole").visual)
    loaded = PeftModel.from_pretrained(visual, tmp_path).eval()
    assert_identical(run(loaded, {"x": images()}), run(model.get_base_model().visual, {"x": images()}))
