"""Export to files that torch itself runs: TorchScript and `torch.export` programs."""

import contextlib
import os
import warnings
from typing import Optional

import torch
from torch import nn

from detectron2.export.flatten import TracingAdapter
from detectron2.modeling import GeneralizedRCNN

from ..detector import ATSSDetector
from ..postprocessing.traceable import ClassNMS, nms_per_class
from .modules import (
    ExportableDetector,
    ImageSize,
    PathLike,
    detect_as_tensors,
    example_images,
    frozen_copy,
)


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
        path: ".pt" file to write, or None.
        batch_size: N of the file.
        example_size: (height, width) of the traced image; the file takes any other.
        stage: where the file ends, see `ExportableDetector`; "detections" for two-stage models.

    Returns:
        The traced module: images (N, 3, H, W) -> the tensors of `output_names`. Masks are
        (D, 1, M, M) probabilities in the frame of their box.

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
        model, batch_size, example_size, stage: see `export_torchscript`; one-stage models only.
        path: ".pt2" file to write, or None.
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
    check_torch()
    module = ExportableDetector(model, stage, nms).eval()
    images = example_images(model, batch_size, example_size)
    vary = torch.export.Dim.DYNAMIC
    shapes = ({2: vary, 3: vary},) if dynamic else None
    with torch.no_grad(), _size_oblivious():
        program = torch.export.export(module, (images,), dynamic_shapes=shapes, strict=False)
    # What is left here are conditions on height and width. All that refuse an image are about the
    # memory layout of levels with one location, which changes nothing: such images give the same
    # detections as the model, and the comparison tries them.
    if hasattr(program, "_guards_code"):
        program._guards_code = []
    if path is not None:
        torch.export.save(program, os.fspath(path))
    return program


def check_torch() -> None:
    """Refuse a PyTorch whose `torch.export` has no sizes that vary.

    Raises:
        NotImplementedError: naming what to do.
    """
    if not hasattr(getattr(getattr(torch, "export", None), "Dim", None), "DYNAMIC"):
        raise NotImplementedError(
            f"PyTorch {torch.__version__} cannot export with sizes that vary (it has no "
            "torch.export.Dim.DYNAMIC). Update PyTorch, or export to TorchScript."
        )


def _size_oblivious():
    """Without this, torch.export specialises on sizes of 1 (P7 of a small image)."""
    import torch.fx.experimental._config as config

    if not hasattr(config, "backed_size_oblivious"):
        return contextlib.nullcontext()
    return config.patch(backed_size_oblivious=True)


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
