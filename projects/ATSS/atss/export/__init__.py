"""Export of a trained detector as TorchScript, torch.export or ONNX."""

from .formats import DEFAULT_OPSET, export_onnx, export_program, export_torchscript
from .metadata import write_metadata

__all__ = [
    "DEFAULT_OPSET",
    "export_onnx",
    "export_program",
    "export_torchscript",
    "write_metadata",
]
