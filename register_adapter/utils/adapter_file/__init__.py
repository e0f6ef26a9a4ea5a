"""An adapter's safetensors file: what is wrong with it is found before a model is touched, or before it is written."""

from .header import TensorInfo, read_header, read_metadata, read_tensors
from .keys import GATE_KEY, NEURON_KEYS, STRENGTH_KEY, TOKENS_KEY, UNITS_KEY, is_foreign, is_of
from .loading import MAX_HEADS, check_adapter_file, check_finite, check_range, check_tensors
from .saving import check_plain, check_savable, check_savable_modules, check_savable_values
from .values import kind_fault

__all__ = [
    "GATE_KEY",
    "MAX_HEADS",
    "NEURON_KEYS",
    "STRENGTH_KEY",
    "TOKENS_KEY",
    "UNITS_KEY",
    "TensorInfo",
    "check_adapter_file",
    "check_finite",
    "check_plain",
    "check_range",
    "check_savable",
    "check_savable_modules",
    "check_savable_values",
    "check_tensors",
    "is_foreign",
    "is_of",
    "kind_fault",
    "read_header",
    "read_metadata",
    "read_tensors",
]
