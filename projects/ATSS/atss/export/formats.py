"""The formats of exported files, by name: how to write one and how to run it."""

import os
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from .modules import PathLike
from .onnx_files import export_onnx, load_onnx
from .torch_files import export_program, export_torchscript

RunFile = Callable[[Tensor], Sequence[Tensor]]


class Format(NamedTuple):
    """A format of files.

    Attributes:
        suffix: how their names end.
        export: `export(model, path, ...)` writes one.
        load: `load(path)` is what a user of the file would call: images (N, 3, H, W) on the CPU ->
            the tensors of `output_names`.
    """

    suffix: str
    export: Callable[..., object]
    load: Callable[[PathLike], RunFile]


def _load_program(path: PathLike) -> RunFile:
    return torch.export.load(os.fspath(path)).module()


def _load_torchscript(path: PathLike) -> RunFile:
    return torch.jit.load(os.fspath(path), map_location="cpu")


FORMATS = {
    "export": Format(".pt2", export_program, _load_program),
    "onnx": Format(".onnx", export_onnx, load_onnx),
    "torchscript": Format(".pt", export_torchscript, _load_torchscript),
}
