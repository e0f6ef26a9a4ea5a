"""Train registers: ``accelerate launch -m register_adapter.train --model_name_or_path ... --output_dir ...``."""

__all__ = ["main"]

if __name__ == "__main__":
    from .commands.cli import train_main

    train_main()  # imports the libraries where Ctrl-C ends in a line
else:
    from .training.launch import main
