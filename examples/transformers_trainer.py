"""Train registers without labels in transformers' own Trainer, on any folder of images.

    python examples/transformers_trainer.py facebook/dinov2-small photos registers
    torchrun --nproc_per_node 8 examples/transformers_trainer.py facebook/dinov2-small photos registers

Started again after a kill, it goes on from its newest checkpoint. For image classification transformers' ``Trainer``
takes a model with registers as it takes any other.
"""

import argparse
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from register_adapter.data import DataArguments, ProcessedDataset, load_data, load_image_processor
from register_adapter.training import DistillationObjective, load_base, wrap
from register_adapter.training.register_trainer import RegisterTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model on the Hub, or its folder")
    parser.add_argument("train_dir", help="a folder of images")
    parser.add_argument("output_dir", help="where checkpoints and the adapter go")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=200, help="steps between two evaluations and checkpoints")
    arguments = parser.parse_args()

    data = load_data(DataArguments(train_dir=arguments.train_dir), labelled=False)
    processor = load_image_processor(arguments.model)
    objective = DistillationObjective(num_views=4)
    model = wrap(load_base(objective, arguments.model), objective, num_registers=4)

    trainer = RegisterTrainer(
        model,
        TrainingArguments(
            arguments.output_dir,
            max_steps=arguments.steps,
            learning_rate=1e-3,
            eval_strategy="steps",
            eval_steps=arguments.every,
            save_steps=arguments.every,
            load_best_model_at_end=True,
            report_to=[],
        ),
        objective,
        ProcessedDataset(data.train, processor),
        ProcessedDataset(data.validation, processor),
    )
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    print({name: round(value, 4) for name, value in trainer.evaluate().items() if name.startswith("eval_")})
    trainer.save_model()  # the adapter alone
    processor.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
