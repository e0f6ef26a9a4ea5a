"""The command line in one of several processes; each writes the registers it ends up with beside the adapter."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from register_adapter.training import launch as train
from register_adapter.training import trainer as training


def main() -> None:
    models: list[Any] = []

    def remember(model: Any, *args: Any, **kwargs: Any) -> Any:
        models.append(model)
        return training.train(model, *args, **kwargs)

    train.train = remember
    train.main(sys.argv[1:])
    (registers,) = (value for name, value in models[0].named_parameters() if "register_adapter_tokens" in name)
    folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    save_file({"registers": registers.detach().clone()}, folder / f"replica-{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main()
