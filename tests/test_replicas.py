"""Replicas of DataParallel: what a replica is asked is computed with its own parameters, as its maker would have it."""

from __future__ import annotations

import threading
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import flatten, run
from stacks_cases import build_stack, images, tower_of
from torch import nn
from torch.testing import assert_close

from register_adapter import RegisterConfig, UnsupportedModelError, add_registers, compose, find_register_layer


def replicate(network: nn.Module, change: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Any:
    """What ``torch.nn.parallel.replicate`` makes for one device, on the CPU; ``change`` makes the parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in copies.items():
        replica._former_parameters = OrderedDict()
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, copies[child])
        for table, values in ((replica._parameters, module._parameters), (replica._buffers, module._buffers)):
            for name, value in values.items():
                if value is None:
                    table[name] = None
                else:
                    setattr(replica, name, change(value))
    return copies[network]


def in_a_thread(call: Callable[[], Any]) -> Any:
    """As DataParallel calls its replicas."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


CALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "forward": ("timm", lambda model: model(images())),
    "forward_features": ("timm", lambda model: model.forward_features(images())),
    "forward_intermediates": ("timm", lambda model: model.forward_intermediates(images())),
    "eva": ("dinov3-timm", lambda model: model.forward_intermediates(images())),
    "features_only": ("features_only", lambda model: model(images())),
    "hub": ("hub", lambda model: model(images(), is_training=True)),
    "hub, layers": ("hub", lambda model: model.get_intermediate_layers(images(), 2)),
    "open_clip": ("open_clip", lambda model: model.forward_intermediates(images())),
    "torchvision": ("torchvision", lambda model: model(images())),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_replica_computes_with_its_own_parameters(name: str) -> None:
    """Those of the original are not there: on another device they would end the pass."""
    stack, call = CALLS[name]
    base = build_stack(stack).eval()
    add_registers(tower_of(stack, base), 3, init_std=1.0).eval()
    with torch.no_grad():
        expected = flatten(call(base))
        replica = replicate(base)
        layer = find_register_layer(base)
        assert layer is not None
        for module in base.modules():
            if not any(module is part for part in layer.modules()):
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.fill_(torch.nan)
        assert_close(flatten(in_a_thread(lambda: call(replica))), expected)


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_a_replica_leaves_out_what_the_thread_that_makes_it_does(name: str) -> None:
    base = (build if name == "vit" else build_stack)(name).eval()
    call = (lambda m: run(m, make_inputs("vit"))) if name == "vit" else (lambda m: flatten(m(images())))
    with torch.no_grad():
        plain = call(base)
        model = add_registers(base, 3, init_std=1.0).eval()
        expected = call(model)
        with model.disable_adapter():
            assert_close(in_a_thread(lambda: call(model)), expected)
            replica = replicate(model)
            assert_close(in_a_thread(lambda: call(replica)), plain)
        assert_close(in_a_thread(lambda: call(replicate(model))), expected)
        assert_close(in_a_thread(lambda: call(replica)), plain)
        assert_close(call(model), expected)


def test_a_composed_model_s_replica_does_so_too() -> None:
    model = compose(build("vit"), {"registers": RegisterConfig(num_registers=3, init_std=1.0)}).eval()
    with torch.no_grad():
        with model.disable_adapter("registers"):
            expected = run(model, make_inputs("vit"))
            replica = replicate(model)
        assert_close(in_a_thread(lambda: run(replica, make_inputs("vit"))), expected)


def test_methods_of_a_replica_do_so_too() -> None:
    base = build_stack("timm").eval()
    with torch.no_grad():
        plain = flatten(base.forward_intermediates(images()))
        model = add_registers(base, 3, init_std=1.0).eval()
        with model.disable_adapter():
            replica = replicate(model)
        found = in_a_thread(lambda: replica.base_model.model.forward_intermediates(images()))
    assert_close(flatten(found), plain)


def test_gradients_of_a_replica_reach_the_registers() -> None:
    base = build_stack("timm").eval()
    model = add_registers(base, 3, init_std=1.0)
    replica = replicate(model)
    sum(value.sum() for value in flatten(in_a_thread(lambda: replica(images()))).values()).backward()
    layer = find_register_layer(model)
    assert layer is not None
    gradient = layer.tokens("default").weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


# Methods that a user has put in the place of the class's


def _doubled(self: Any, x: torch.Tensor, **options: Any) -> Any:
    return type(self).forward_intermediates(self, 2 * x, **options)


def test_a_user_s_own_method_is_called_and_comes_back() -> None:
    base = build_stack("timm").eval()
    base.forward_intermediates = own = types.MethodType(_doubled, base)
    plain = add_registers(build_stack("timm"), 3).eval()
    model = add_registers(base, 3).eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = flatten(plain.get_base_model().forward_intermediates(2 * images()))
        assert_close(flatten(base.forward_intermediates(images())), expected)
        assert_close(flatten(replicate(base).forward_intermediates(images())), expected)
    model.unload()
    assert base.forward_intermediates == own
    assert "_replicate_for_data_parallel" not in vars(base)


def test_one_that_was_put_there_later_stays_and_may_call_ours() -> None:
    base = build_stack("hub").eval()
    model = add_registers(base, 3, init_std=1.0).eval()
    ours = base.forward_features
    with torch.no_grad():
        expected = flatten(base.forward_features(images()))
        base.forward_features = theirs = lambda x, masks=None: ours(x, masks)
        model.add_adapter("more", RegisterConfig(num_registers=2))
        assert_close(flatten(base.forward_features(images())), expected)
    model.unload()
    assert base.forward_features is theirs


def test_a_function_in_which_registers_cannot_be_counted_is_refused() -> None:
    base = build_stack("timm").eval()
    free = build_stack("timm").forward_intermediates
    base.forward_intermediates = lambda x: free(x)
    model = add_registers(base, 3).eval()
    with pytest.raises(UnsupportedModelError, match=r"MethodType\(function, model\)"):
        base.forward_intermediates(images())
    with model.disable_adapter():
        base.forward_intermediates(images())
