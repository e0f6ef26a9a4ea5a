"""Reentrant gradient checkpointing: blocks have backward passes of their own, and a parameter gets one gradient a pass.

DistributedDataParallel takes the first gradient that a parameter gets for the whole.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from execution_cases import WAYS, gradients, registered, trained
from families import make_inputs
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from register_adapter import RegisterAdapterError, find_tower


def counted(model: Any) -> list[str]:
    """Names of parameters, at every gradient that they get."""
    seen: list[str] = []
    for name, value in trained(model).items():
        value.register_post_accumulate_grad_hook(lambda value, name=name: seen.append(name))
    return seen


def by_own_code(model: Any) -> None:
    """Checkpoint the blocks from outside, as the registers cannot know."""
    find_tower(model).part("embeddings").register_forward_hook(lambda module, args, output: output.requires_grad_())
    for block in find_tower(model).part("blocks"):
        forward = block.forward

        def again(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return checkpoint(lambda *given: forward(*given, **kwargs), *args, use_reentrant=True)

        block.forward = again


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_every_parameter_gets_one_gradient(way: str, passes: int) -> None:
    model, inputs = registered("vit", way).train(), make_inputs("vit")
    expected = gradients(model, inputs)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    seen = counted(model)
    for _ in range(passes):
        grads = gradients(model, inputs)
    assert sorted(seen) == sorted(list(expected) * passes)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("way", ["key_value", "gate"])
def test_two_passes_before_one_backward(way: str) -> None:
    model, inputs = registered("vit", way).train(), make_inputs("vit")
    expected = gradients(model, inputs)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.zero_grad()
    losses = [model(**inputs).last_hidden_state.square().mean() for _ in range(2)]
    sum(losses).backward()
    for name, value in trained(model).items():
        torch.testing.assert_close(value.grad, 2 * expected[name])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("way", ["key_value", "gate"])
def test_blocks_that_own_code_checkpoints_are_refused_under_ddp(
    way: str, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = registered("vit", way).train(), make_inputs("vit")
    expected = gradients(model, inputs)
    by_own_code(model)
    torch.testing.assert_close(gradients(model, inputs), expected)
    # As in the forward pass of a DistributedDataParallel, which needs a process group.
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", SimpleNamespace(static_graph=static))
    if static:
        torch.testing.assert_close(gradients(model, inputs), expected)
        return
    with pytest.raises(RegisterAdapterError, match="static_graph=True"):
        model(**inputs)
    with torch.no_grad():
        model(**inputs)
