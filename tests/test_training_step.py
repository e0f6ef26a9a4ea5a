"""Only registers (and modules_to_save) get gradients and change, and every register gets a gradient of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crossings import crossings
from families import CASES, FAMILIES, KINDS, WIDTH, build, make_inputs
from peft import get_peft_model

from register_adapter import RegisterConfig, add_registers, find_register_layer

TRAINABLE = [name for name, case in CASES.items() if not case.no_gradient]
#: The gradient comes to them through a tower; what is behind it does not tell registers apart.
INSIDE = [name for name in TRAINABLE if name in {*FAMILIES, *KINDS}]
CLASSIFIERS = [name for name in CASES if name.endswith("classifier")]


def loss_of(name: str, outputs: Any) -> torch.Tensor:
    value = outputs[CASES[name].output]
    tensors = value if isinstance(value, tuple) else (value,)
    return sum((tensor * torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape)).sum() for tensor in tensors)


@pytest.mark.parametrize(("name", "attention"), crossings(TRAINABLE, ("eager", "sdpa")))
def test_one_step_changes_registers_and_nothing_else(name: str, attention: str) -> None:
    base = build(name, attention).requires_grad_(True)
    model = add_registers(base, 4).train()
    trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 1
    assert trainable[0].endswith("registers.register_adapter_tokens.default.weight")
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    # The frozen weights are handed over too: without a gradient they must stay.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loss_of(name, model(**make_inputs(name))).backward()
    assert all(parameter.grad is None for key, parameter in model.named_parameters() if key not in trainable)
    optimizer.step()
    changed = [key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])]
    assert changed == trainable


@pytest.mark.parametrize(("name", "num_registers"), crossings(INSIDE, (1, 4, 16), whole=("vit", "beit", "dinov3")))
def test_every_register_gets_its_own_gradient(name: str, num_registers: int) -> None:
    model = add_registers(build(name), num_registers)
    loss_of(name, model(**make_inputs(name))).backward()
    gradient = find_register_layer(model).tokens("default").weight.grad
    assert gradient.shape == (num_registers, WIDTH)
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().amax(dim=1) > 0).all()
    distances = torch.cdist(gradient, gradient) + torch.eye(num_registers) * 1e9
    assert (distances > 1e-7 * gradient.norm()).all()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_modules_to_save_train_beside_the_registers(name: str) -> None:
    model = add_registers(build(name), 4, modules_to_save=["classifier"]).train()
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss_of(name, model(**make_inputs(name))).backward()
    optimizer.step()
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert len(changed) == 3
    assert all("register_adapter_tokens" in key or "classifier.modules_to_save.default" in key for key in changed)


def test_a_loss_with_labels_reaches_the_registers() -> None:
    model = add_registers(build("vit-classifier"), 4)
    model(**make_inputs("vit-classifier"), labels=torch.tensor([0, 1])).loss.backward()
    assert find_register_layer(model).tokens("default").weight.grad.abs().sum() > 0


def test_training_registers_lowers_the_loss() -> None:
    model = add_registers(build("vit-classifier"), 4)
    inputs, labels = make_inputs("vit-classifier", batch=8), torch.arange(8) % 5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(20):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


def test_zeros_warn_because_equal_registers_stay_equal() -> None:
    with pytest.warns(UserWarning, match="equal registers get equal gradients"):
        model = add_registers(build("vit"), 4, init="zeros")
    weight = find_register_layer(model).tokens("default").weight
    assert not weight.any()
    loss_of("vit", model(**make_inputs("vit"))).backward()
    torch.testing.assert_close(weight.grad, weight.grad[:1].expand_as(weight))


def test_init_std_is_the_spread_of_the_initial_values() -> None:
    weight = find_register_layer(add_registers(build("vit"), 64, init_std=0.5)).tokens("default").weight
    assert weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert abs(weight.mean().item()) < 0.05


@pytest.mark.parametrize("name", ["vit", "deit", "clip-vision", "dinov2", "dinov2-registers"])
def test_init_cls_starts_at_the_cls_token(name: str) -> None:
    layer = find_register_layer(add_registers(build(name), 4, init="cls", init_std=0.0))
    cls = layer.tower.part("cls_token").reshape(1, WIDTH)
    assert torch.equal(layer.tokens("default").weight, cls.expand(4, WIDTH))
    noisy = find_register_layer(add_registers(build(name), 4, init="cls", init_std=0.02)).tokens("default").weight
    assert 0 < (noisy - cls).std() < 0.05


def test_a_seed_gives_the_same_registers() -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(find_register_layer(get_peft_model(build("vit"), RegisterConfig())).tokens("default").weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_half_precision_base_trains_float32_registers() -> None:
    model = add_registers(build("vit", dtype=torch.bfloat16), 4)
    tokens = find_register_layer(model).tokens("default")
    assert tokens.weight.dtype == torch.float32
    assert model(**make_inputs("vit", dtype=torch.bfloat16)).last_hidden_state.dtype == torch.bfloat16


def test_trainable_parameters_are_counted() -> None:
    assert add_registers(build("vit"), 4).get_nb_trainable_parameters()[0] == 4 * WIDTH
