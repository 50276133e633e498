"""Export of a trained detector as TorchScript, torch.export or ONNX."""

from .check import (
    check_sizes,
    compare_with_eager,
    first_stage_that_differs,
    format_table,
    spread_scores,
)
from .formats import (
    DEFAULT_OPSET,
    MissingOperatorError,
    export_onnx,
    export_program,
    export_torchscript,
    load_exported,
)
from .metadata import class_names_of, collect_metadata, resize_rule, write_metadata
from .modules import STAGES

__all__ = [
    "DEFAULT_OPSET",
    "MissingOperatorError",
    "STAGES",
    "check_sizes",
    "class_names_of",
    "collect_metadata",
    "compare_with_eager",
    "export_onnx",
    "export_program",
    "export_torchscript",
    "first_stage_that_differs",
    "format_table",
    "load_exported",
    "resize_rule",
    "spread_scores",
    "write_metadata",
]
