"""Imports modules in a process without the optional packages.

Usage: ``python import_without_extras.py PACKAGE,PACKAGE MODULE...``
"""

import importlib
import sys

import accelerate  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
from absent import forbid

# transformers imports these lazily, and itself has uses for some of the packages.
from transformers import (  # noqa: F401
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    ViTModel,
)

forbid(*sys.argv[1].split(","))
for name in sys.argv[2:]:
    importlib.import_module(name)
print("imported")
