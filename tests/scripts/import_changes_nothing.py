"""Compares the process before and after ``import register_adapter``, with the libraries below it imported before."""

import importlib
import logging
import os
import random
import warnings
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import datasets  # noqa: F401
import huggingface_hub  # noqa: F401
import numpy as np
import peft
import peft.tuners.tuners_utils
import safetensors.torch  # noqa: F401
import torch
import transformers.utils.logging
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


def state() -> dict[str, Any]:
    return {
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "files": sorted(path.name for path in Path().iterdir()),
        "warnings": [str(rule) for rule in warnings.filters],
        "handlers": [str(handler) for handler in logging.getLogger().handlers],
        "verbosity": transformers.utils.logging.get_verbosity(),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": str(np.random.get_state()),
        "rng": str(random.getstate()),
        "module hooks": len(torch.nn.modules.module._global_forward_hooks),
        "module class": sorted(vars(torch.nn.Module)),
        "peft model": sorted(vars(peft.PeftModel)),
        "types": sorted(kind.value for kind in peft.PeftType),
        "configs": sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING),
        "tuners": sorted(kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING),
        "prefixes": sorted(kind.value for kind in PEFT_TYPE_TO_PREFIX_MAPPING),
    }


before = state()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import register_adapter
importlib.reload(register_adapter)  # a second import adds nothing
importlib.reload(register_adapter.tuner)
after = state()
for name in ("types", "configs", "tuners", "prefixes"):
    new = set(after.pop(name)) ^ set(before.pop(name))
    assert new == {"REGISTER_ADAPTER", "OFFSET_POSITIONS"}, (name, new)
for name in before:
    assert before[name] == after[name], (name, before[name], after[name])
print("as before")
