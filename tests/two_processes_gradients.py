"""One of two processes: registers' gradients, and the registers after a step, under DDP, FSDP and ZeRO-3.

Each process has a half of the batch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
from execution_cases import SHARDED, gradients, registered, trained, trained_values, whole
from families import make_inputs
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from register_adapter import find_tower

RATE = 0.1
Tensors = dict[str, torch.Tensor]


def shard(model: nn.Module) -> nn.Module:
    """Every block a unit of its own, as training scripts do it; the registers belong to the root's."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in find_tower(model).part("blocks"):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def times_of_a_plain_layer() -> torch.Tensor:
    """What FSDP2 multiplies the gradient of a plain layer by: 1 where it takes the mean over the processes."""
    from torch.distributed.fsdp import fully_shard

    layer = nn.Linear(1, 1, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    layer(torch.ones(1, 1)).sum().backward()  # the gradient is 1
    return whole(layer.weight.grad).reshape(())


def step_of_torch(wrap: Callable[[nn.Module], nn.Module], model: nn.Module, inputs: Tensors) -> tuple[Tensors, Tensors]:
    model = wrap(model)
    grads = gradients(model, inputs)
    torch.optim.SGD(trained(model).values(), lr=RATE).step()
    return grads, trained_values(model)


def step_of_deepspeed(model: nn.Module, inputs: Tensors) -> tuple[Tensors, Tensors]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    config = {
        "train_batch_size": distributed.get_world_size(),
        # Otherwise it keeps every parameter of fewer than 100,000 numbers whole.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(trained(model).values(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine(**inputs).last_hidden_state.square().mean())
    grads = {name: safe_get_full_grad(value).clone() for name, value in trained(model).items()}
    engine.step()
    return grads, {name: safe_get_full_fp32_param(value).clone() for name, value in trained(model).items()}


def step_of_fsdp1(model: nn.Module, inputs: Tensors) -> tuple[Tensors, Tensors]:
    """By PEFT's own policy, Trainer's for any of its models: a trainable leaf, such as the registers, is a unit."""
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel

    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = type(find_tower(model).part("blocks")[0]).__name__
    sharded: nn.Module = FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=True, device_id=torch.device("cpu")
    )
    optimizer = torch.optim.SGD([value for value in sharded.parameters() if value.requires_grad], lr=RATE)
    sharded(**inputs).last_hidden_state.square().mean().backward()
    with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
        grads = {name: value.grad.clone() for name, value in trained(sharded).items()}
    optimizer.step()
    with FullyShardedDataParallel.summon_full_params(sharded):
        values = trained_values(sharded)
    return grads, values


STEPS = {
    "ddp": lambda model, inputs: step_of_torch(DistributedDataParallel, model, inputs),
    "fsdp2": lambda model, inputs: step_of_torch(shard, model, inputs),
    "fsdp1": step_of_fsdp1,
    "zero3": step_of_deepspeed,
}


def main() -> None:
    file, *kinds = sys.argv[1:]
    torch.set_num_threads(1)
    if "zero3" in kinds:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        # By a file, not a port that another process may have taken meanwhile.
        place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        distributed.init_process_group("gloo", init_method=f"file://{file}.store", **place)
    rank = distributed.get_rank()
    results = {"plain layer": times_of_a_plain_layer()} if "fsdp2" in kinds else {}
    for kind in kinds:
        for name, way in SHARDED:
            inputs = {key: value[rank : rank + 1] for key, value in make_inputs(name).items()}
            grads, values = STEPS[kind](registered(name, way).train(), inputs)
            results |= {f"{kind} {name} {way} grad {key}": value for key, value in grads.items()}
            results |= {f"{kind} {name} {way} step {key}": value for key, value in values.items()}
    if rank == 0:
        save_file(results, file)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
