"""Train registers and a new head on an image folder, with the public API.

    python examples/real_photographs.py photos
    accelerate launch examples/train_classifier.py facebook/dinov2-small photos/train registers

The second argument is a folder with one sub-folder of images a class. The third receives the adapter, a few kB.
"""

import argparse

from peft import AutoPeftModel

from register_adapter.data import DataArguments, load_data, load_image_processor
from register_adapter.training import ClassificationObjective, TrainArguments, load_base, train, wrap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model on the Hub, or its folder")
    parser.add_argument("train_dir", help="an image folder")
    parser.add_argument("output_dir", help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()

    # Images that cannot be read are reported and left out; 15 % of the others are kept for the evaluation.
    data = load_data(DataArguments(train_dir=arguments.train_dir))

    # A frozen model with a new head for the folder's classes; what is trained is four registers and that head.
    objective = ClassificationObjective(labels=data.labels)
    model = wrap(load_base(objective, arguments.model), objective, num_registers=4)
    model.print_trainable_parameters()

    results = train(
        model,
        objective,
        data.train,
        TrainArguments(output_dir=arguments.output_dir, max_train_steps=arguments.steps, num_warmup_steps=10),
        eval_dataset=data.validation,
        image_processor=load_image_processor(arguments.model),
        training_data=data.name,
    )
    print(f"accuracy on {results['eval_samples']} held-out images: {results['metrics']['eval_accuracy']:.3f}")

    # The folder holds all that is needed to load it again.
    AutoPeftModel.from_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
