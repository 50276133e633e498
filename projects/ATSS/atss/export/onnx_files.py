"""Export to ONNX files, and running them with onnxruntime.

PyTorch's exporter translates most operators; three are translated here: suppression per class,
which ONNX can do in one node and exactly; stable sorting; and deformable convolution.
"""

import functools
import os
from typing import Callable, Dict, List

import torch
from torch import Tensor

from ..detector import ATSSDetector
from ..layers import DeformConv2d
from ..postprocessing.traceable import nms_per_class
from .modules import ImageSize, PathLike, frozen_copy, output_names
from .torch_files import check_torch, export_program

DEFAULT_OPSET = 20  # DeformConv came with 19


def export_onnx(
    model: ATSSDetector,
    path: PathLike,
    batch_size: int = 1,
    example_size: ImageSize = (256, 320),
    stage: str = "detections",
    dynamic: bool = True,
    opset: int = DEFAULT_OPSET,
) -> None:
    """An ONNX file, with NMS inside.

    Args:
        model, batch_size, example_size, stage, dynamic: see `export_program`.
        path: ".onnx" file to write.
        opset: version of the ONNX operators, at least 18.

    Raises:
        ImportError: without onnx and onnxscript.
        ValueError: for an opset that is too old; see also `export_program`.
        NotImplementedError, TypeError: see `export_program`.
    """
    check_torch()
    try:
        import onnx  # noqa: F401
        from onnxscript import ir
    except ImportError as error:
        raise _missing_packages("ONNX export needs onnx and onnxscript", error) from error
    least = 19 if any(isinstance(m, DeformConv2d) for m in model.modules()) else 18
    if opset < least:
        raise ValueError(f"This model needs an ONNX opset of {least} or newer, got {opset}.")
    core = frozen_copy(model).proposal_generator
    # More of one class than of the whole image are never kept.
    most = max(core.selector.detections_per_image, 0)
    nms = functools.partial(_nms_operator(), num_classes=core.num_classes, most=most)
    exported = torch.onnx.export(
        export_program(model, None, batch_size, example_size, stage, dynamic, nms),
        (),
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=output_names(model, batch_size, stage),
        custom_translation_table=_translations(),
        verbose=False,
    )
    if dynamic:  # name the sizes that vary, for people who look at the file
        graph = exported.model.graph
        graph.inputs[0].shape = ir.Shape([batch_size, 3, "height", "width"])
        for output in graph.outputs if stage in ("candidates", "detections") else ():
            output.shape = ir.Shape([stage, *output.shape[1:]])
    exported.save(os.fspath(path), external_data=False)


def load_onnx(path: PathLike) -> Callable[[Tensor], List[Tensor]]:
    """An ONNX file as a function that runs it with onnxruntime, on the CPU.

    Raises:
        ImportError: without onnxruntime.
        NotImplementedError: if this onnxruntime lacks an operator of the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing_packages("Running an ONNX file needs onnxruntime", error) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime has classes of its own for these
        if "NOT_IMPLEMENTED" not in str(error) and "not a registered function" not in str(error):
            raise
        raise NotImplementedError(
            f"onnxruntime {onnxruntime.__version__} lacks an operator of this model on the CPU "
            f"({error}). Version 1.31 has all that are used here; without it, export with "
            "--format torchscript or --format export."
        ) from error
    return lambda images: [
        torch.as_tensor(output) for output in session.run(None, {"images": images.numpy()})
    ]


def _missing_packages(problem: str, error: ImportError) -> ImportError:
    return ImportError(f'{problem} ({error}). Install with `pip install "atss[export]"`.')


@functools.lru_cache(None)
def _nms_operator() -> Callable[..., Tensor]:
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


def _translations() -> Dict[Callable, Callable]:
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
        inputs = (input, weight, offset, bias, mask if use_mask else None)
        return op.DeformConv(
            *inputs,
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
