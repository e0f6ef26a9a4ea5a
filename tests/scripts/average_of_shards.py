"""An average over a model that FSDP2 shards over two processes, beside that of the same model whole."""

from __future__ import annotations

import sys

import torch
from torch import nn

from register_adapter.training import AverageWeights


def run(rank: int, store: str) -> None:
    from torch.distributed import barrier, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole = nn.Linear(5, 6)
    sharded = nn.Linear(5, 6)
    sharded.load_state_dict(whole.state_dict())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    averages = [AverageWeights(0.5), AverageWeights(0.5)]
    models = (whole, sharded)
    for step in range(3):
        for model, average in zip(models, averages, strict=True):
            average.on_step_begin(model, 0.0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.0 + step)
            average.on_step_end(model)
    states = [average.state_dict() for average in averages]
    for name, value in states[0]["average"].items():
        assert torch.equal(value, states[1]["average"][name])
    again = AverageWeights(0.5)
    again.load_state_dict(sharded, states[0])
    own = {name: value.full_tensor() for name, value in sharded.named_parameters()}
    again.on_evaluate_begin(sharded)
    for name, value in sharded.named_parameters():
        assert torch.equal(value.full_tensor(), states[0]["average"][name])
    again.on_evaluate_end(sharded)
    assert all(torch.equal(value.full_tensor(), own[name]) for name, value in sharded.named_parameters())
    barrier()  # gloo's threads die hard where the other process has gone
    destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, (sys.argv[1],), nprocs=2)
