"""Export of a trained detector as TorchScript, torch.export or ONNX."""

from .comparison import (
    compare_with_eager,
    first_stage_that_differs,
    format_table,
    sizes_to_compare,
    spread_scores,
)
from .formats import FORMATS
from .metadata import class_names_of, collect_metadata, resize_rule, write_metadata
from .modules import STAGES
from .onnx_files import DEFAULT_OPSET, export_onnx
from .torch_files import export_program, export_torchscript

__all__ = [
    "DEFAULT_OPSET",
    "FORMATS",
    "STAGES",
    "class_names_of",
    "collect_metadata",
    "compare_with_eager",
    "export_onnx",
    "export_program",
    "export_torchscript",
    "first_stage_that_differs",
    "format_table",
    "resize_rule",
    "sizes_to_compare",
    "spread_scores",
    "write_metadata",
]
