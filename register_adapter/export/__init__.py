"""A trained model that no longer needs this package: a plain model, an ONNX file, or a ``torch.export`` program."""

from .native import NATIVE, export_native, save_native
from .program import export_onnx, export_program
from .saved import export_saved

__all__ = ["NATIVE", "export_native", "export_onnx", "export_program", "export_saved", "save_native"]
