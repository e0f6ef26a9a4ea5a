"""Modules with hooks that somebody replaces, and what registers hand to the code around them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import assert_identical, flatten, run
from processes import run_script
from stacks_cases import build_stack, images
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from register_adapter import (
    RegisterConfig,
    RegisterPeftModel,
    UnsupportedModelError,
    add_registers,
    find_register_layer,
    find_tower,
)


def replace(model: nn.Module, field: str, make: Callable[[nn.Module], nn.Module]) -> None:
    tower = find_tower(model)
    old = tower.part(field)
    place, _, name = next(path for path, module in tower.module.named_modules() if module is old).rpartition(".")
    setattr(tower.module.get_submodule(place), name, make(old))


@pytest.mark.parametrize("options", [{}, {"insert_layer": 1}], ids=str)
@pytest.mark.parametrize("make", [lambda old: nn.Identity(), copy.copy, copy.deepcopy], ids=["other", "copy", "deep"])
@pytest.mark.parametrize("name", ["vit", "timm"])
def test_a_replaced_norm_gets_the_hooks(name: str, make: Any, options: dict[str, Any]) -> None:
    base, inputs = (build(name), make_inputs(name)) if name == "vit" else (build_stack(name), {"x": images()})
    model = add_registers(base, 3, init_std=1.0, **options).eval()
    replaced = copy.deepcopy(model).unload()
    replace(replaced, "remove", make)
    again = add_registers(replaced, 3, **options).eval()
    with torch.no_grad():
        find_register_layer(again).tokens("default").weight.copy_(find_register_layer(model).tokens("default").weight)
    replace(base, "remove", make)
    assert_identical(run(model, inputs), run(again, inputs))


@pytest.mark.parametrize("step", ["add", "save", "unload"])
@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("embeddings", {}),
        ("remove", {"insert_layer": 1}),
        ("blocks", {"deep": True}),
        ("blocks", {"key_value": True}),
        ("blocks", {"register_neurons": {1: [0, 5]}}),
    ],
    ids=str,
)
def test_a_copy_of_a_hooked_module_is_as_any_other_before_the_next_pass(
    field: str, options: dict[str, Any], step: str, tmp_path: Path
) -> None:
    """Its hooks, of a copy of the layer, stayed: registers in the output, also of the unloaded base; no save."""
    model, inputs = add_registers(build("vit"), 3, init_std=1.0, **options).eval(), make_inputs("vit")
    expected = run(model, inputs)
    replace(model, field, copy.deepcopy)
    if step == "unload":
        base = model.unload()
        assert_identical(run(base, inputs), run(build("vit"), inputs))
        assert not any(type(vars(part).get("config")).__name__ == "AttentionConfig" for part in base.modules())
        return
    if step == "add":
        model.add_adapter("other", RegisterConfig(num_registers=2, **options))
        model.delete_adapter("other")
    else:
        model.save_pretrained(tmp_path)
        assert_identical(run(RegisterPeftModel.from_pretrained(build("vit"), tmp_path), inputs), expected)
    assert_identical(run(model, inputs), expected)


def test_a_copied_block_behind_the_others_has_no_neurons_of_the_one_it_was() -> None:
    # The ViT of transformers 4 takes as many blocks as its config says.
    model, inputs = (
        add_registers(build("clip-vision"), 3, register_neurons={1: [0, 5]}).eval(),
        make_inputs("clip-vision"),
    )
    weight = find_register_layer(model).tokens("default").weight
    replace(model, "blocks", lambda old: nn.ModuleList([*old, copy.deepcopy(old[1])]))
    longer = build("clip-vision")
    replace(longer, "blocks", lambda old: nn.ModuleList([*old, copy.deepcopy(old[1])]))
    again = add_registers(longer, 3, register_neurons={1: [0, 5]}).eval()
    with torch.no_grad():
        find_register_layer(again).tokens("default").weight.copy_(weight)
    assert_identical(run(model, inputs), run(again, inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "field", "options"),
    [
        ("vit", "embeddings", {}),
        ("open_clip", "embeddings", {"deep": True}),
        ("vit", "mlp_out", {"register_neurons": {0: [0, 3, 7]}}),
    ],
    ids=["embeddings", "norm", "neurons"],
)
def test_a_graph_of_replaced_modules_is_refused_until_the_hooks_have_moved(
    name: str, field: str, options: dict[str, Any]
) -> None:
    """Three patches were cut, or no register or neuron took part any more."""
    base, pixels = (build(name), make_inputs(name)["pixel_values"]) if name == "vit" else (build_stack(name), images())
    model = add_registers(base, 3, init_std=1.0, **options).eval()
    tower = find_tower(model)
    old = tower.block_part(0, field) if field == "mlp_out" else tower.part(field)
    path = next(path for path, module in tower.module.named_modules() if module is old)
    place, _, attribute = path.rpartition(".")
    plain = build(name) if name == "vit" else build_stack(name)
    torch._dynamo.reset()
    compiled, broken = (torch.compile(model, backend="eager", fullgraph=whole) for whole in (True, False))
    with torch.no_grad():
        expected = flatten(model(pixels))
        torch.testing.assert_close(flatten(compiled(pixels)), expected)
        setattr(tower.module.get_submodule(place), attribute, plain.get_submodule(path))
        # Of an error inside a graph torch 2.8 tells the kind alone.
        with pytest.raises(Exception, match=r"were replaced or wrapped after the registers|UnsupportedModelError"):
            compiled(pixels)
        torch.testing.assert_close(flatten(broken(pixels)), expected)
        torch.testing.assert_close(flatten(model(pixels)), expected)
        torch.testing.assert_close(flatten(compiled(pixels)), expected)


def test_registers_that_do_not_come_out_are_an_error() -> None:
    model, inputs = add_registers(build("vit"), 3).eval(), make_inputs("vit")
    tower = find_tower(model)
    # Behind the start of the pass, where hooks are renewed.
    tower.part("blocks")[0].register_forward_pre_hook(
        lambda module, args: replace(model, "remove", lambda old: nn.Identity())
    )
    with pytest.raises(UnsupportedModelError, match="did not leave it at 'layernorm'"):
        model(**inputs)


@pytest.mark.parametrize("options", [{}, {"insert_layer": 1}, {"deep": True}], ids=str)
@pytest.mark.parametrize(
    "stack",
    [
        "timm",
        "timm-avg",
        "timm-no-class",
        "timm-registers",
        "timm-unpooled",
        "features_only",
        "timm-clip",
        "open_clip",
        "open_clip-avg",
        "torchvision",
    ],
)
def test_fx_records_registers_inside_of_blocks(stack: str, options: dict[str, Any]) -> None:
    """What a user asks for between blocks is without them, and so are layers of torch, which run with their hooks."""
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="traces with torch.fx")
    model, pixels = add_registers(build_stack(stack), 3, init_std=1.0, **options).eval(), images()
    tower, layer = find_tower(model), find_register_layer(model)
    eager, blocks = tower.module, list(tower.part("blocks"))
    seen: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda module, args, output: seen.append(output)) for block in blocks]
    with torch.no_grad():
        expected = eager(pixels)
    for handle in handles:
        handle.remove()
    graph = torch.fx.symbolic_trace(eager)
    with torch.no_grad():
        assert_near(graph(pixels), expected)
        assert_near(eager(pixels), expected)
        assert_near(torch.fx.Interpreter(graph).run(pixels), expected)
    names = {module: name for name, module in eager.named_modules()}
    wanted = {names[block]: str(index) for index, block in enumerate(blocks)}
    with torch.no_grad():
        found = feature_extraction.create_feature_extractor(eager, wanted, suppress_diff_warning=True)(pixels)
    for index, hidden in enumerate(seen):
        count = layer.count_at(index)
        patches = torch.cat([hidden[:, : tower.prefix], hidden[:, tower.prefix + count :]], dim=1)
        torch.testing.assert_close(found[str(index)], patches, rtol=1e-5, atol=1e-5)
    graph(pixels)[0].sum().backward()
    assert layer.tokens("default").weight.grad.abs().sum() > 0
    with layer.without(["default"]):
        base = torch.fx.symbolic_trace(eager)
        with torch.no_grad():
            plain = eager(pixels)
    with torch.no_grad():
        assert_near(base(pixels), plain)


def assert_near(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(flatten(actual), flatten(expected), rtol=1e-5, atol=1e-5)


def test_a_model_whose_trace_was_broken_off_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = add_registers(build_stack("torchvision"), 3, init_std=1.0).eval(), images()
    last = list(find_tower(model).part("blocks"))[-1]
    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", lambda hidden: hidden if hidden.sum() else None)
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(find_tower(model).module)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))  # before a pass, which ends the recording
    with torch.no_grad():
        expected = find_tower(model).module(pixels)
        for same in (model, *copies):
            eager = find_tower(same).module
            assert_near(eager(pixels), expected)
            assert_near(torch.fx.symbolic_trace(eager)(pixels), expected)


@pytest.mark.parametrize(
    ("stack", "leaf"),
    [
        ("timm", "blocks.0"),
        ("timm", "blocks.1"),
        ("torchvision", "encoder.layers.encoder_layer_1"),
        ("torchvision", "encoder.layers"),
        ("torchvision", "encoder"),
    ],
)
def test_blocks_that_a_user_has_fx_record_as_single_steps(stack: str, leaf: str) -> None:
    """Registers would not enter them; what is around the places where they come in and leave is right as it is."""
    model, pixels = add_registers(build_stack(stack), 3, init_std=1.0).eval(), images()
    eager = find_tower(model).module

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return module_qualified_name == leaf or super().is_leaf_module(m, module_qualified_name)

    def run_graph() -> Any:
        return torch.fx.GraphModule(eager, Tracer().trace(eager))(pixels)

    with torch.no_grad():
        if leaf == "encoder":
            assert_near(run_graph(), eager(pixels))
            return
        with pytest.raises(UnsupportedModelError, match="recorded its blocks as single steps"):
            run_graph()
        assert_near(torch.fx.symbolic_trace(eager)(pixels), eager(pixels))


@pytest.mark.slow
def test_a_graph_that_fx_recorded_is_not_compiled() -> None:
    model, pixels = add_registers(build_stack("torchvision"), 3).eval(), images()
    tower = find_tower(model).module
    graph, expected = torch.fx.symbolic_trace(tower), tower(pixels)
    torch._dynamo.reset()
    # Older torch leaves the words out: "Observed exception".
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Compile the model itself|Observed exception"):
        torch.compile(graph, backend="eager", fullgraph=True)(pixels)
    torch._dynamo.reset()
    assert_near(torch.compile(tower, backend="eager", fullgraph=True)(pixels), expected)


@pytest.mark.parametrize(
    ("stack", "options"),
    [
        ("timm", {"register_neurons": {1: [3]}}),
        ("torchvision", {"register_neurons": {1: [3]}}),
        ("eva02", {}),
        ("dinov3-timm", {}),
    ],
    ids=str,
)
def test_what_fx_cannot_record_is_refused(stack: str, options: dict[str, Any]) -> None:
    pytest.importorskip("torchvision.models.feature_extraction", reason="traces with torch.fx")
    model = add_registers(build_stack(stack), 3, **options).eval()
    with pytest.raises(UnsupportedModelError, match=r"torch\.fx is tracing"):
        torch.fx.symbolic_trace(find_tower(model).module)


@pytest.mark.parametrize("options", [{}, {"deep": True}, {"key_value": True}, {"gate": -1.0}], ids=str)
def test_registers_enter_as_a_copy_of_their_parameter(options: dict[str, Any]) -> None:
    """FSDP and the FLOP counter allow no view of a parameter to leave the module that owns it."""
    model, inputs = add_registers(build("vit"), 3, **options), make_inputs("vit")
    weight = find_register_layer(model).tokens("default").weight
    block = None if not options or "gate" in options else 0
    assert not find_register_layer(model).tokens("default")(weight, block)._is_view()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert counter.get_total_flops() > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"key_value": True}, {"gate": -1.0}], ids=str)
def test_a_pickled_model_runs_in_another_process(options: dict[str, Any], tmp_path: Path) -> None:
    model = add_registers(build("vit", "sdpa"), 3, init_std=1.0, **options).eval()
    inputs = make_inputs("vit")
    torch.save((model, inputs), tmp_path / "model.pt")
    run_script("run_pickled_model", tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "hidden.pt"), run(model, inputs)["last_hidden_state"])


@pytest.mark.slow
def test_the_first_pass_of_a_loaded_trainable_adapter_is_one_graph(tmp_path: Path) -> None:
    add_registers(build("vit"), 3, init_std=1.0).save_pretrained(tmp_path)
    inputs = make_inputs("vit")
    expected = run(RegisterPeftModel.from_pretrained(build("vit"), tmp_path), inputs)["last_hidden_state"]
    model = RegisterPeftModel.from_pretrained(build("vit"), tmp_path, is_trainable=True)
    torch._dynamo.reset()
    hidden = torch.compile(model, fullgraph=True, backend="eager")(**inputs).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
