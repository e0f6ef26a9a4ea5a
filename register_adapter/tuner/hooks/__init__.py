"""The hooks of a register layer, one file for each place where registers are at work."""

from .attention import AttentionHooks
from .base import LayerHooks
from .call_state import CallState
from .choice import Choice
from .methods import MethodHooks
from .neurons import NeuronHooks
from .sequence import SequenceHooks

__all__ = ["AttentionHooks", "CallState", "Choice", "LayerHooks", "MethodHooks", "NeuronHooks", "SequenceHooks"]
