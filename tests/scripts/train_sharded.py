"""transformers' Trainer on a composed model with a head, in as many processes as there are: folder, images each.

Several processes shard it with FSDP2, which accelerate leaves out on a CPU unless it takes the processes for GPUs. The
run stops after two of its four steps and goes on; the best checkpoint is not the last.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from register_adapter import RegisterConfig, compose

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


class Stop(TrainerCallback):
    """Ends the first run early, and shows what was sharded."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        kinds = {type(value).__name__ for value in kwargs["model"].parameters()}
        print("parameters", *sorted(kinds))
        control.should_training_stop = state.global_step == 2


def trainer(folder: str, size: int) -> Trainer:
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=3, **SIZES))
    registers = RegisterConfig(num_registers=2, deep=True, modules_to_save=["classifier"])
    model: Any = compose(base, {"registers": registers, "lora": LoraConfig(target_modules=["q_proj", "query"])})
    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(pixels)]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    blocks = {"version": 2, "transformer_layer_cls_to_wrap": ["ViTLayer"], "state_dict_type": "FULL_STATE_DICT"}
    args = TrainingArguments(
        folder,
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=2,
        save_steps=1,
        eval_steps=1,
        save_strategy="steps",
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="step",
        greater_is_better=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **({"fsdp": "full_shard auto_wrap", "fsdp_config": blocks} if processes > 1 else {}),
    )
    if processes > 1:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Counting(model, args, train_dataset=images, eval_dataset=images[:4])


class Counting(Trainer):
    """The metric is far from the third step, after which it is best."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        metrics["eval_step"] = abs(self.state.global_step - 3)
        return metrics


if __name__ == "__main__":
    folder, size = sys.argv[1], int(sys.argv[2])
    first = trainer(folder, size)
    first.add_callback(Stop())
    first.train()
    second = trainer(folder, size)
    second.train(resume_from_checkpoint=str(Path(folder, "checkpoint-2")))
    second.save_model(f"{folder}/best")
