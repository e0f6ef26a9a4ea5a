"""Contexts of coroutines overlap in one thread, or end in another one: each sees its own, and none is left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import run
from torch.testing import assert_close

from register_adapter import RegisterConfig, add_registers, capture, compose


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return add_registers(build("vit"), num_registers=3, init_std=1.0).eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return make_inputs("vit")


@pytest.fixture
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, dict[str, torch.Tensor]]]:
    """With registers and without; a test leaves the model with them."""
    with model.disable_adapter():
        without = run(model, inputs)
    known = {"with": run(model, inputs), "without": without}
    assert not torch.equal(known["with"]["last_hidden_state"], without["last_hidden_state"])
    yield known
    assert_close(run(model, inputs), known["with"], rtol=0, atol=0)


def test_coroutines_in_one_thread(model: Any, inputs: Any, outputs: Any) -> None:
    """Two are inside at once, the first leaves first, a third runs with registers beside them."""

    async def disabled(before: float, inside: float) -> None:
        await asyncio.sleep(before)
        with model.disable_adapter():
            assert_close(run(model, inputs), outputs["without"])
            await asyncio.sleep(inside)
            assert_close(run(model, inputs), outputs["without"])
            in_thread = await asyncio.to_thread(run, model, inputs)
            assert_close(in_thread, outputs["without"])

    async def enabled() -> None:
        for _ in range(3):
            assert_close(run(model, inputs), outputs["with"])
            await asyncio.sleep(0.01)

    async def serve() -> None:
        await asyncio.gather(disabled(0, 0.02), disabled(0.01, 0.02), enabled())

    asyncio.run(serve())


def in_another_thread(call: Any, *args: Any) -> None:
    thread = threading.Thread(target=call, args=args)
    thread.start()
    thread.join()


def test_left_in_another_thread(model: Any, inputs: Any, outputs: Any) -> None:
    """As servers do that run each half of a context manager in whatever thread is free."""
    for enter_elsewhere in (True, False):
        context = model.disable_adapter()
        if enter_elsewhere:
            in_another_thread(context.__enter__)
        else:
            context.__enter__()
        in_another_thread(context.__exit__, None, None, None)
        assert_close(run(model, inputs), outputs["with"])
    grown = compose(model, {"more": RegisterConfig(num_registers=1)})  # refused while a context is open
    grown.delete_adapter("more")


def test_contexts_left_in_the_order_of_entry(model: Any, inputs: Any, outputs: Any) -> None:
    first, second = model.disable_adapter(), model.disable_adapter()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert_close(run(model, inputs), outputs["without"])
    second.__exit__(None, None, None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_captures_its_own_passes(attention: str) -> None:
    """Pairs of keys and values are in the maps of those that capture, and of nobody else, also afterwards."""
    model = add_registers(build("vit", attention), num_registers=3, key_value=True, init_std=1.0).eval()
    batches = [{"pixel_values": make_inputs("vit")["pixel_values"] + shift} for shift in (0.0, 1.0)]
    plain = run(model, batches[0], output_attentions=attention == "eager")
    expected = []
    for batch in batches:
        with capture(model) as trace:
            model(**batch)
        expected.append((*trace.hidden_states, *trace.attentions))

    async def capturing(number: int, waits: int) -> None:
        with capture(model) as trace:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            model(**batches[number])
            for _ in range(waits):
                await asyncio.sleep(0)
        assert_close((*trace.hidden_states, *trace.attentions), expected[number], rtol=0, atol=0)

    async def others() -> None:
        for _ in range(8):
            assert_close(run(model, batches[0], output_attentions=attention == "eager"), plain, rtol=0, atol=0)
            await asyncio.sleep(0)

    async def serve() -> None:
        await asyncio.gather(capturing(0, 3), others(), capturing(1, 1), capturing(0, 5))

    asyncio.run(serve())
    asyncio.run(others())


def test_a_capture_sees_the_tasks_that_are_started_in_it(model: Any, inputs: Any) -> None:
    async def passes() -> None:
        run(model, inputs)

    async def serve() -> int:
        with capture(model) as trace:
            await asyncio.gather(passes())
            seen = len(trace.attentions)
        with capture(model) as trace:
            await asyncio.to_thread(run, model, inputs)
        return seen * len(trace.attentions)

    assert asyncio.run(serve()) > 0
