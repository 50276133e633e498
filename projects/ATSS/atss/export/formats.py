"""How does a trained detector leave Python? As a TorchScript, a torch.export or an ONNX file.

All three hold the same modules, those of `export_modules.py`. `export_check.py` compares a file
with its model, `export_metadata.py` describes it.
"""

import contextlib
import functools
import os
import warnings
from typing import Optional

import torch
from torch import nn

from detectron2.export.flatten import TracingAdapter

from ..detector import ATSSDetector
from ..layers import DeformConv2d
from ..postprocessing.traceable import ClassNMS, nms_per_class
from .modules import (
    ExportableDetector,
    PathLike,
    RawHeads,
    Size,
    detect_as_tensors,
    example_images,
    frozen_copy,
    output_names,
)
from .operators import nms_operator, translations

__all__ = ["DEFAULT_OPSET", "export_onnx", "export_program", "export_torchscript"]

DEFAULT_OPSET = 20  # DeformConv came with 19


def export_torchscript(
    model: nn.Module,
    path: Optional[PathLike] = None,
    batch_size: int = 1,
    example_size: Size = (256, 320),
    raw_heads: bool = False,
) -> torch.jit.ScriptModule:
    """TorchScript that runs with torch and torchvision alone, on any image size and device.

    Args:
        model: an `ATSSDetector`, or a two-stage `GeneralizedRCNN` with boxes and maybe masks.
        path: file to write, or None.
        batch_size: N of the file.
        example_size: (height, width) of the traced image; the file takes any other.
        raw_heads: export `RawHeads`.

    Returns:
        The traced module: images (N, 3, H, W) -> the tensors of `output_names`. Masks are
        (D, 1, M, M) probabilities in the frame of their box.

    Raises:
        TypeError: for another model, or raw heads of a two-stage model.
    """
    if raw_heads:
        adapter = TracingAdapter(RawHeads(model), example_images(model, batch_size, example_size))
    else:
        adapter = TracingAdapter(
            frozen_copy(model, two_stage=True),
            example_images(model, batch_size, example_size),
            inference_func=detect_as_tensors,
        )
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
    example_size: Size = (256, 320),
    raw_heads: bool = False,
    nms: ClassNMS = nms_per_class,
) -> "torch.export.ExportedProgram":
    """A `torch.export` program.

    Args:
        model: the detector.
        path: ".pt2" file to write, or None.
        batch_size: N of the file.
        example_size: (height, width) of the example image; any other will do later, except for raw
            heads, whose size this is.
        raw_heads: export `RawHeads`, with all shapes fixed.
        nms: see `traceable.detect`.

    Returns:
        The program: images (N, 3, H, W) -> the tensors of `output_names`.

    Raises:
        TypeError: for a model that is not an `ATSSDetector`.
        NotImplementedError: on a PyTorch too old for sizes that vary.
    """
    _check_torch()
    module = (RawHeads(model) if raw_heads else ExportableDetector(model, nms)).eval()
    images = example_images(model, batch_size, example_size)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = None if raw_heads else ({2: dynamic, 3: dynamic},)
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
    is_deformable = any(isinstance(module, DeformConv2d) for module in model.modules())
    least = 19 if is_deformable else 18
    if opset < least:
        raise ValueError(f"This model needs an ONNX opset of {least} or newer, got {opset}.")
    nms = functools.partial(
        nms_operator(),
        num_classes=model.proposal_generator.num_classes,
        # More of one class than of the whole image are never kept.
        most=max(model.proposal_generator.selector.detections_per_image, 0),
    )
    program = export_program(model, None, batch_size, example_size, raw_heads, nms)
    exported = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=output_names(model, batch_size, raw_heads),
        custom_translation_table=translations(),
        verbose=False,
    )
    if not raw_heads:
        _name_sizes(exported.model, batch_size)
    exported.save(os.fspath(path), external_data=False)


def _size_oblivious():
    """Else sizes of 1, such as P7 of a small image, count as another program than larger ones."""
    try:
        import torch.fx.experimental._config as config
    except ImportError:
        return contextlib.nullcontext()
    if hasattr(config, "backed_size_oblivious"):
        return config.patch(backed_size_oblivious=True)
    return contextlib.nullcontext()


def _check_torch() -> None:
    if not hasattr(getattr(getattr(torch, "export", None), "Dim", None), "DYNAMIC"):
        raise NotImplementedError(
            f"PyTorch {torch.__version__} cannot export with sizes that vary (it has no "
            "torch.export.Dim.DYNAMIC). Update PyTorch, or export to TorchScript."
        )


def _clean_graphs(traced: torch.jit.ScriptModule) -> None:
    """Take out of a trace what Detectron2's ROI heads leave in it, in 0.5 in many places.

    The device of the example: every graph now asks one of its inputs. And the function by which
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
        constants = [
            node
            for node in graph.findAllNodes("prim::Constant", recurse=True)
            if str(node.output().type()) == "Device"
        ]
        if constants:
            # Sizes come in as whole numbers on the CPU; images and features are floats.
            inputs = [v for v in graph.inputs() if str(v.type()) == "Tensor"]
            images = [v for v in inputs if v.type().scalarType() == "Float" and v.type().dim() > 1]
            assert images, f"no image or feature map goes into {module.original_name}"
            node = graph.create("prim::device", [images[0]], 1)
            node.output().setType(torch._C.DeviceObjType.get())
            graph.prependNode(node)
            for constant in constants:
                constant.output().replaceAllUsesWith(node.output())
        torch._C._jit_pass_dce(graph)


def _name_sizes(model, batch_size: int) -> None:
    """Give the sizes that may vary a name, for people who look at the file."""
    import onnxscript.ir as ir

    model.graph.inputs[0].shape = ir.Shape([batch_size, 3, "height", "width"])
    for output in model.graph.outputs:
        output.shape = ir.Shape(["detections", *output.shape[1:]])
