"""torch's compiler takes the graph of one module for others of its class, and by default looks at no hooks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from execution_cases import registered
from families import build, make_inputs
from helpers import assert_identical, differs, flatten, run
from torch import nn

from register_adapter import RegisterConfig, add_registers, capture, find_tower
from register_adapter.tuner.hooks.recording import _drop_graphs


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    torch._dynamo.reset()
    _drop_graphs.cache_clear()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        yield


def frozen(name: str) -> Any:
    """Registers freeze a base, which alone would have it compiled anew."""
    return build(name).requires_grad_(False).eval()


def compile_parts(model: nn.Module, how: str) -> None:
    tower = find_tower(model)
    if how == "tower":
        tower.module.compile(backend="eager")
    for index, block in enumerate(tower.part("blocks")):
        if how == "blocks":
            block.compile(backend="eager")
        elif how == "broken":
            end = tower.block_part(index, "mlp_out")
            end.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    if how == "broken":
        model.compile(backend="eager")


def near(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Up to the last bits, which a compiled base alone has otherwise in some releases of torch."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tower", "blocks", "broken"])
@pytest.mark.parametrize(
    ("name", "way"), [("vit", "neurons"), ("vit", "default"), ("dinov2", "deep"), ("beit", "gate")]
)
def test_a_base_that_was_compiled_before_does_not_lend_its_graphs(name: str, way: str, how: str) -> None:
    inputs = make_inputs(name)
    expected, plain = run(registered(name, way, frozen(name)), inputs), run(frozen(name), inputs)
    before = frozen(name)
    compile_parts(before, how)
    near(run(before, inputs), plain)
    base = frozen(name)
    compile_parts(base, how)
    model = registered(name, way, base)
    near(run(model, inputs), expected)
    near(run(before, inputs), plain)
    assert_identical(run(model, inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [{}, {"insert_layer": 1}, {"register_neurons": {1: [3]}}], ids=["first", "late", "neurons"]
)
def test_a_compiled_model_that_gets_an_adapter_has_it(way: dict[str, Any]) -> None:
    inputs = make_inputs("vit")
    model, eager = frozen("vit"), frozen("vit")
    model.compile(backend="eager")
    plain = run(model, inputs)
    for each in (model, eager):
        torch.manual_seed(0)
        each.add_adapter(RegisterConfig(num_registers=2, init_std=1.0, **way))
    assert differs(run(eager, inputs), plain)
    assert_identical(run(model, inputs), run(eager, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "broken"])
def test_register_neurons_of_one_block_are_in_graphs_that_another_thread_makes(how: str) -> None:
    """What torch is told holds for the thread that adds registers."""
    inputs = make_inputs("vit")
    model = add_registers(frozen("vit"), 2, register_neurons={1: [0, 3, 7]}).eval()
    expected = run(model, inputs)
    compile_parts(model, how)
    with ThreadPoolExecutor(1) as pool:
        assert_identical(pool.submit(run, model, inputs).result(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tower", "blocks"])
def test_capture_sees_a_model_that_was_compiled_and_run_before(how: str) -> None:
    """There was nothing in the trace, or no attention map."""
    inputs = make_inputs("vit")
    model, eager = (build("vit", "eager").eval() for _ in range(2))
    compile_parts(model, how)
    run(model, inputs)
    traces = []
    for each in (model, eager):
        with torch.no_grad(), capture(each) as trace:
            each(**inputs)
        traces.append({"hidden": trace.hidden_states, "attentions": trace.attentions})
    assert traces[1]["hidden"]
    assert traces[1]["attentions"]
    assert_identical(flatten(traces[0]), flatten(traces[1]))
    assert_identical(run(model, inputs), run(eager, inputs))
