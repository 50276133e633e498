"""Formats of a file: TorchScript, torch.export and ONNX, how to write them and how to run them.

All three hold the modules of `modules.py`. PyTorch's exporter translates most operators to ONNX;
three are translated here: suppression per class, which ONNX can do in one node and exactly; stable
sorting; and deformable convolution.
"""

import contextlib
import functools
import os
import warnings
from typing import Callable, Dict, Optional, Sequence

import torch
from torch import Tensor, nn

from detectron2.export.flatten import TracingAdapter
from detectron2.modeling import GeneralizedRCNN

from ..detector import ATSSDetector
from ..layers import DeformConv2d
from ..postprocessing.traceable import ClassNMS, nms_per_class
from .modules import (
    ExportableDetector,
    ImageSize,
    PathLike,
    detect_as_tensors,
    example_images,
    frozen_copy,
    output_names,
)

DEFAULT_OPSET = 20  # DeformConv came with 19

RunFile = Callable[[Tensor], Sequence[Tensor]]


class MissingOperatorError(RuntimeError):
    """The installed onnxruntime lacks an operator of the model."""


def export_torchscript(
    model: nn.Module,
    path: Optional[PathLike] = None,
    batch_size: int = 1,
    example_size: ImageSize = (256, 320),
    stage: str = "detections",
) -> torch.jit.ScriptModule:
    """TorchScript that runs with torch and torchvision alone, on any image size and device.

    Args:
        model: an `ATSSDetector`, or a two-stage `GeneralizedRCNN` with boxes and maybe masks.
        path: file to write, or None.
        batch_size: N of the file.
        example_size: (height, width) of the traced image; the file takes any other.
        stage: where the file ends, see `ExportableDetector`; "detections" for two-stage models.

    Returns:
        The traced module: images (N, 3, H, W) -> the tensors of `output_names`. Masks are
        (D, 1, side, side) probabilities in the frame of their box.

    Raises:
        TypeError: for another model, or another stage of a two-stage model.
        ValueError: for an unknown stage.
    """
    if isinstance(model, GeneralizedRCNN) and stage == "detections":
        module, function = frozen_copy(model, two_stage=True), detect_as_tensors
    else:
        module, function = ExportableDetector(model, stage).eval(), None
    images = example_images(model, batch_size, example_size)
    adapter = TracingAdapter(module, images, inference_func=function)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    _clean_graphs(traced)
    if path is not None:
        traced.save(os.fspath(path))
    return traced


def export_program(
    model: ATSSDetector,
    path: Optional[PathLike] = None,
    batch_size: int = 1,
    example_size: ImageSize = (256, 320),
    stage: str = "detections",
    dynamic: bool = True,
    nms: ClassNMS = nms_per_class,
) -> "torch.export.ExportedProgram":
    """A `torch.export` program.

    Args:
        model, batch_size, stage: see `export_torchscript`; one-stage models only.
        path: ".pt2" file to write, or None.
        example_size: (height, width) of the example image.
        dynamic: whether the file takes images of any other size too; else all shapes up to the raw
            heads are fixed.
        nms: see `traceable.detect_in_graph`.

    Returns:
        The program: images (N, 3, H, W) -> the tensors of `output_names`.

    Raises:
        TypeError: for a model that is not an `ATSSDetector`.
        ValueError: for an unknown stage.
        NotImplementedError: on a PyTorch too old for sizes that vary.
    """
    _check_torch()
    module = ExportableDetector(model, stage, nms).eval()
    images = example_images(model, batch_size, example_size)
    vary = torch.export.Dim.DYNAMIC
    shapes = ({2: vary, 3: vary},) if dynamic else None
    with torch.no_grad(), _size_oblivious():
        program = torch.export.export(module, (images,), dynamic_shapes=shapes, strict=False)
    # What is left here are conditions on height and width. All that refuse an image are about the
    # memory layout of levels with one location, which changes nothing: such images give the same
    # detections as the model, and the check tries them.
    if hasattr(program, "_guards_code"):
        program._guards_code = []
    if path is not None:
        torch.export.save(program, os.fspath(path))
    return program


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
        TypeError: for a model that is not an `ATSSDetector`.
        ValueError: for an unknown stage, or an opset that is too old.
        NotImplementedError: on a PyTorch too old for sizes that vary.
    """
    _check_torch()
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX export needs onnx and onnxscript ({error}). Install them with "
            '`pip install "atss[export]"`.'
        ) from error
    least = 19 if any(isinstance(m, DeformConv2d) for m in model.modules()) else 18
    if opset < least:
        raise ValueError(f"This model needs an ONNX opset of {least} or newer, got {opset}.")
    nms = _onnx_nms(frozen_copy(model))
    program = export_program(model, None, batch_size, example_size, stage, dynamic, nms)
    exported = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=output_names(model, batch_size, stage),
        custom_translation_table=_translations(),
        verbose=False,
    )
    if dynamic:
        _name_sizes(exported.model, batch_size, stage)
    exported.save(os.fspath(path), external_data=False)


def load_exported(path: PathLike, export_format: str) -> RunFile:
    """What a user of the file would call.

    Args:
        path: of the file.
        export_format: "torchscript", "export" or "onnx".

    Returns:
        Function images (N, 3, H, W) on the CPU -> tensors of `output_names`.
    """
    if export_format == "onnx":
        session = load_onnx(path)
        return lambda images: [
            torch.as_tensor(output) for output in session.run(None, {"images": images.numpy()})
        ]
    if export_format == "export":
        return torch.export.load(os.fspath(path)).module()
    return torch.jit.load(os.fspath(path), map_location="cpu")


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


def _size_oblivious():
    """Without this, torch.export specialises on sizes of 1 (P7 of a small image)."""
    import torch.fx.experimental._config as config

    if not hasattr(config, "backed_size_oblivious"):
        return contextlib.nullcontext()
    return config.patch(backed_size_oblivious=True)


def _check_torch() -> None:
    if not hasattr(getattr(getattr(torch, "export", None), "Dim", None), "DYNAMIC"):
        raise NotImplementedError(
            f"PyTorch {torch.__version__} cannot export with sizes that vary (it has no "
            "torch.export.Dim.DYNAMIC). Update PyTorch, or export to TorchScript."
        )


def _clean_graphs(traced: torch.jit.ScriptModule) -> None:
    """Remove from a trace what Detectron2's ROI heads leave in it, in 0.5 in many places.

    The device of the example: every graph then asks one of its inputs. And the function by which
    Cascade R-CNN scales gradients, which no file can hold.
    """
    for module in traced.modules():
        try:
            graph = module.graph
        except RuntimeError:
            continue  # no forward: a list of modules
        for node in graph.findAllNodes("prim::PythonOp", recurse=True):
            if node.pyname() == "_ScaleGradient":
                node.output().replaceAllUsesWith(next(node.inputs()))
                node.destroy()
        constants = graph.findAllNodes("prim::Constant", recurse=True)
        devices = [node for node in constants if str(node.output().type()) == "Device"]
        if devices:
            # Sizes come in as whole numbers on the CPU; images and features are floats.
            inputs = [v for v in graph.inputs() if str(v.type()) == "Tensor"]
            images = [v for v in inputs if v.type().scalarType() == "Float" and v.type().dim() > 1]
            assert images, f"no image or feature map goes into {module.original_name}"
            device = graph.create("prim::device", [images[0]], 1)
            device.output().setType(torch._C.DeviceObjType.get())
            graph.prependNode(device)
            for node in devices:
                node.output().replaceAllUsesWith(device.output())
        torch._C._jit_pass_dce(graph)


def _name_sizes(model, batch_size: int, stage: str) -> None:
    """Give the sizes that may vary a name, for people who look at the file."""
    import onnxscript.ir as ir

    model.graph.inputs[0].shape = ir.Shape([batch_size, 3, "height", "width"])
    if stage in ("candidates", "detections"):
        for output in model.graph.outputs:
            output.shape = ir.Shape([stage, *output.shape[1:]])


def _onnx_nms(model: ATSSDetector) -> ClassNMS:
    """Suppression per class by the operator below."""
    core = model.proposal_generator
    # More of one class than of the whole image are never kept.
    most = max(core.selector.detections_per_image, 0)
    return functools.partial(_nms_operator(), num_classes=core.num_classes, most=most)


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
