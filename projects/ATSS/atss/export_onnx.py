"""How does a detector become an ONNX file that a runtime without PyTorch can run?

Most operators have a translation in PyTorch's exporter. Three get one of ours: suppression per
class, which ONNX can do in one node and exactly; stable sorting; and deformable convolution.
"""

import functools
import os

import torch
from torch import Tensor

from .detector import ATSSDetector
from .export import PathLike, Size, export_program, output_names
from .traceable import nms_per_class

__all__ = ["DEFAULT_OPSET", "MissingOperatorError", "export_onnx", "load_onnx"]

DEFAULT_OPSET = 20  # DeformConv came with 19


class MissingOperatorError(RuntimeError):
    """The installed onnxruntime lacks an operator of the model."""


def export_onnx(
    model: ATSSDetector,
    path: PathLike,
    batch_size: int = 1,
    example_size: Size = (256, 320),
    raw_heads: bool = False,
    opset: int = DEFAULT_OPSET,
) -> None:
    """An ONNX file with dynamic height and width, and NMS inside.

    Args:
        model: the detector.
        path: ".onnx" file to write.
        batch_size: N of the file.
        example_size: (height, width) of the example image; any other will do later, except for raw
            heads, whose size this is.
        raw_heads: export `RawHeads`, with all shapes fixed.
        opset: version of the ONNX operators, at least 18.

    Raises:
        ImportError: without onnx and onnxscript.
        TypeError: for a model that is not an `ATSSDetector`.
        ValueError: for an opset that is too old.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX export needs onnx and onnxscript ({error}). Install them with "
            '`pip install "atss[export]"`.'
        ) from error
    least = 19 if _is_deformable(model) else 18
    if opset < least:
        raise ValueError(f"This model needs an ONNX opset of {least} or newer, got {opset}.")
    nms = functools.partial(
        _onnx_nms(),
        num_classes=model.proposal_generator.num_classes,
        # More of one class than of the whole image are never kept.
        most=max(model.proposal_generator.detections_per_image, 0),
    )
    program = export_program(model, None, batch_size, example_size, raw_heads, nms)
    exported = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=output_names(model, batch_size, raw_heads),
        custom_translation_table=_translations(),
        verbose=False,
    )
    if not raw_heads:
        _name_sizes(exported.model, batch_size)
    exported.save(os.fspath(path), external_data=False)


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
            f"({error}). The file itself is valid ONNX: use a newer onnxruntime or another "
            "runtime, or export with --format torchscript or --format export."
        ) from error


def _is_deformable(model: ATSSDetector) -> bool:
    from .layers import DeformConv2d

    return any(isinstance(module, DeformConv2d) for module in model.modules())


@functools.lru_cache(None)
def _onnx_nms():
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


def _translations():
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


def _name_sizes(model, batch_size: int) -> None:
    """Give the sizes that may vary a name, for people who look at the file."""
    import onnxscript.ir as ir

    model.graph.inputs[0].shape = ir.Shape([batch_size, 3, "height", "width"])
    for output in model.graph.outputs:
        output.shape = ir.Shape(["detections", *output.shape[1:]])
