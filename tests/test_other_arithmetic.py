"""Another number of threads, or no oneDNN, as on another CPU: trained registers are the same but for rounding.

Longer runs drift apart on real data, so docs/results.md gives three seeds and their range; see there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from families import build, make_inputs

from register_adapter import add_registers


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trained() -> torch.Tensor:
    torch.manual_seed(0)
    model = add_registers(build("vit"), 2, init_std=1.0).train()
    (registers,) = (value for value in model.parameters() if value.requires_grad)
    optimizer = torch.optim.SGD([registers], lr=0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        model(**make_inputs("vit", batch=4)).last_hidden_state.square().mean().backward()
        optimizer.step()
    return registers.detach()


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("way", ["two threads", "no oneDNN"])
def test_trained_registers_agree(way: str) -> None:
    with _threads(1):
        expected = _trained()
    with _threads(2 if way == "two threads" else 1), torch.backends.mkldnn.flags(enabled=way == "two threads"):
        torch.testing.assert_close(_trained(), expected, rtol=1e-4, atol=1e-5)
