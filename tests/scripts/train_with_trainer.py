"""transformers' Trainer without labels, in as many processes as there are: folder, images each; ``push`` uploads."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import TrainingArguments

from register_adapter import add_registers
from register_adapter.testbed import load_vit
from register_adapter.training import DistillationObjective
from register_adapter.training.register_trainer import RegisterTrainer


def items(count: int) -> list[dict[str, Any]]:
    pixels = torch.randn(count, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "index": index} for index, image in enumerate(pixels)]


if __name__ == "__main__":
    folder, size, *push = sys.argv[1:]
    torch.manual_seed(0)
    model = add_registers(load_vit(), 2)
    hub = {"push_to_hub": True, "hub_model_id": "author/by-trainer", "hub_strategy": "end"} if push else {}
    args = TrainingArguments(
        folder,
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=int(size),
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **hub,
    )
    trainer = RegisterTrainer(model, args, DistillationObjective(num_views=2), items(14), items(5))
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())
    if push:
        trainer.push_to_hub()
