"""Train registers: ``accelerate launch -m register_adapter.train --model_name_or_path ... --output_dir ...``."""

from .training.launch import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
