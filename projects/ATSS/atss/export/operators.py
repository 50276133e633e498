"""Which operators does ONNX get from us?

Most have a translation in PyTorch's exporter. Three are translated here: suppression per class,
which ONNX can do in one node and exactly; stable sorting; and deformable convolution.
"""

import functools
import os
from typing import Callable, Dict

import torch
from torch import Tensor

from ..postprocessing.traceable import nms_per_class
from .modules import PathLike

__all__ = ["MissingOperatorError", "load_onnx", "nms_operator", "translations"]


class MissingOperatorError(RuntimeError):
    """The installed onnxruntime lacks an operator of the model."""


def load_onnx(path: PathLike):
    """An onnxruntime session on the CPU.

    Args:
        path: of an ONNX file.

    Raises:
        ImportError: without onnxruntime.
        MissingOperatorError: if this onnxruntime lacks an operator of the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"Running an ONNX file needs onnxruntime ({error}). Install it with "
            '`pip install "atss[export]"`.'
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime has classes of its own for these
        if "NOT_IMPLEMENTED" not in str(error) and "not a registered function" not in str(error):
            raise
        raise MissingOperatorError(
            f"onnxruntime {onnxruntime.__version__} lacks an operator of this model on the CPU "
            f"({error}). Version 1.31 has all that are used here; without it, export with "
            "--format torchscript or --format export."
        ) from error


@functools.lru_cache(None)
def nms_operator() -> Callable[..., Tensor]:
    """An operator that stands for suppression per class until it is translated."""
    library = torch.library

    @library.custom_op("atss_export::nms_per_class", mutates_args=())
    def nms(
        boxes: Tensor,
        ranks: Tensor,
        classes: Tensor,
        nms_thresh: float,
        num_classes: int,
        most: int,
    ) -> Tensor:
        return nms_per_class(boxes, ranks, classes, nms_thresh)

    @nms.register_fake
    def _(boxes, ranks, classes, nms_thresh, num_classes, most):
        return classes.new_empty(library.get_ctx().new_dynamic_size())

    return nms


def translations() -> Dict[Callable, Callable]:
    """ONNX functions by the PyTorch operator that they stand for."""
    from onnxscript import opset19 as op

    def nms_translated(boxes, ranks, classes, nms_thresh, num_classes, most):
        class_ids = op.Constant(value_ints=list(range(num_classes)))
        is_class = op.Equal(op.Unsqueeze(classes, [0]), op.Unsqueeze(class_ids, [1]))  # (K, D)
        # Ranks are 1 or more; what is below a half has another class.
        scores = op.Where(is_class, op.Unsqueeze(ranks, [0]), op.Constant(value_float=0.0))
        selected = op.NonMaxSuppression(
            op.Unsqueeze(boxes, [0]),
            op.Unsqueeze(scores, [0]),
            op.Constant(value_ints=[most if most > 0 else 2**31 - 1]),
            op.Constant(value_floats=[float(nms_thresh)]),
            op.Constant(value_floats=[0.5]),
        )  # (D', 3): image, class, box
        idxs = op.Reshape(op.Slice(selected, [2], [3], [1]), [-1])
        # Boxes come best first, so the order of their places is that of their scores.
        idxs, _ = op.TopK(idxs, op.Shape(idxs), largest=0, sorted=1)
        return idxs

    def sort_stable(self, stable=None, dim: int = -1, descending: bool = False):
        # TopK of everything; ONNX says that of equal values the first comes first.
        size = op.Reshape(op.Gather(op.Shape(self), dim, axis=0), op.Constant(value_ints=[1]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    def deform_conv2d(
        input, weight, offset, mask, bias,
        stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int,
        groups: int, offset_groups: int, use_mask: bool,
    ):  # fmt: skip
        return op.DeformConv(
            input,
            weight,
            offset,
            bias,
            mask if use_mask else None,
            dilations=[dilation_h, dilation_w],
            group=groups,
            offset_group=offset_groups,
            pads=[pad_h, pad_w, pad_h, pad_w],
            strides=[stride_h, stride_w],
        )

    return {
        torch.ops.atss_export.nms_per_class.default: nms_translated,
        torch.ops.aten.sort.stable: sort_stable,
        torch.ops.torchvision.deform_conv2d.default: deform_conv2d,
    }
