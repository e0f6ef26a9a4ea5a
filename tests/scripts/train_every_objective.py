"""Every label-free objective for a few steps, in one process or several; what was learned goes into a file."""

import sys
from pathlib import Path

import torch
import transformers as tf
from accelerate.state import PartialState
from safetensors.torch import save_file

from register_adapter.artifacts.rules import Threshold
from register_adapter.training import (
    DistillationObjective,
    NormObjective,
    PreservationObjective,
    RefinementObjective,
    SmoothObjective,
    TrainArguments,
    train,
)
from register_adapter.training.moving import Moving, put_on
from register_adapter.training.objectives.outliers import Outliers

STEPS, BATCH = 20, 8
# Random weights: about a tenth of the tokens is called an outlier.
LINE = Outliers(1, Threshold("fixed", 1.62, 0.0, True))
OBJECTIVES = [
    DistillationObjective(3),
    RefinementObjective(LINE, num_crops=1),
    SmoothObjective(LINE),
    NormObjective(LINE),
    PreservationObjective(),
]


class Images(torch.utils.data.Dataset):
    """Noise that says which epoch it is, as processed images do."""

    def __init__(self):
        self.pixels = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "index": index, "epoch": self.epoch}


def train_all(batch_size):
    """Name of an objective to what it has learned."""
    learned = {}
    for objective in OBJECTIVES:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        base = tf.ViTModel(tf.ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
        moving = "registers+positions" if objective.name == "smooth" else "registers"
        model = put_on(base, Moving.parse(moving), {"num_registers": 2, "init_std": 0.5})
        args = TrainArguments(
            max_train_steps=STEPS, per_device_train_batch_size=batch_size, learning_rate=1e-2, use_cpu=True, quiet=True
        )
        train(model, objective, Images(), args)
        learned[objective.name] = torch.cat(
            [value.detach().flatten() for value in model.parameters() if value.requires_grad]
        )
    return learned


if __name__ == "__main__":
    state = PartialState(cpu=True)
    result = train_all(BATCH // state.num_processes)
    if state.is_main_process:
        save_file(result, Path(sys.argv[1]))
