"""How does a trained detector leave Python? As a TorchScript or a torch.export file.

All formats hold the same computation: a tensor of images in, tensors out, with normalisation,
padding, decoding and NMS inside. ONNX is in `export_onnx.py`, the comparison with the model in
`export_check.py`, the description beside the file in `export_metadata.py`.
"""

import contextlib
import copy
import os
import warnings
from typing import List, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.export.flatten import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances

from .anchors import GraphBoxes
from .detector import ATSSDetector
from .head import flatten_levels
from .traceable import ClassNMS, detect, nms_per_class

__all__ = [
    "ExportableDetector",
    "RawHeads",
    "example_images",
    "export_program",
    "export_torchscript",
    "output_names",
]

PathLike = Union[str, "os.PathLike[str]"]
Size = Tuple[int, int]


class ExportableDetector(nn.Module):
    """Detections of images of one size as plain tensors.

    Args:
        model: the detector; left as it is.
        nms: see `traceable.detect`.

    Raises:
        TypeError: for a model that is not an `ATSSDetector`.
    """

    def __init__(self, model: ATSSDetector, nms: ClassNMS = nms_per_class):
        super().__init__()
        self.model = _frozen_copy(model)
        self.nms = nms

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Detect.

        Args:
            images: (N, 3, H, W) float32 in 0..255, channels in the order of `input_format`.

        Returns:
            boxes (D, 4) xyxy in pixels of the input, scores (D,), classes (D,) int64, by falling
            score; with N > 1 image after image, and fourth image_idxs (D,) int64.
        """
        core = self.model.proposal_generator
        features = self.model.backbone(_normalize_and_pad(self.model, images))
        feature_list = [features[name] for name in core.in_features]
        anchors = core.anchor_generator._grid_anchors(feature_list)
        results = detect(
            core.head(feature_list),
            [GraphBoxes(level) for level in anchors],
            [(images.shape[-2], images.shape[-1])] * len(images),
            core.box2box_transform.apply_deltas,
            score_thresh=core.score_thresh,
            topk=core.topk_candidates,
            nms_thresh=core.nms_thresh,
            max_detections=core.detections_per_image,
            sqrt_score=core.sqrt_score,
            box_offset=core.box_offset,
            nms=self.nms,
        )
        return _join([tuple(result) for result in results])


class RawHeads(nn.Module):
    """What the head says, without selection or NMS: all shapes follow from that of the input.

    Args:
        model: the detector; left as it is.

    Raises:
        TypeError: for a model that is not an `ATSSDetector`.
    """

    def __init__(self, model: ATSSDetector):
        super().__init__()
        self.model = _frozen_copy(model)

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Predict for every anchor.

        Args:
            images: (N, 3, H, W) float32 in 0..255, channels in the order of `input_format`.

        Returns:
            logits (N, R, K), boxes (N, R, 4) decoded, xyxy in pixels and not clipped, and
            centerness (N, R) logits for a head that has it. R counts the anchors of all levels.
        """
        core = self.model.proposal_generator
        features = self.model.backbone(_normalize_and_pad(self.model, images))
        feature_list = [features[name] for name in core.in_features]
        predictions = core.head(feature_list)
        num_anchors = core.anchor_generator.num_anchors[0]
        anchors = torch.cat(core.anchor_generator._grid_anchors(feature_list))
        deltas = flatten_levels(predictions.deltas, num_anchors)
        decode = core.box2box_transform.apply_deltas
        boxes = torch.stack([decode(image_deltas, anchors) for image_deltas in deltas])
        outputs = (flatten_levels(predictions.logits, num_anchors), boxes + core.box_offset)
        if predictions.centerness is not None:
            outputs += (flatten_levels(predictions.centerness, num_anchors).squeeze(2),)
        return outputs


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
            _frozen_copy(model, two_stage=True),
            example_images(model, batch_size, example_size),
            inference_func=_detect_as_tensors,
        )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    _unfreeze_devices(traced)
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
        RuntimeError: on a PyTorch without torch.export's dynamic sizes.
    """
    if not hasattr(torch, "export") or not hasattr(torch.export, "Dim"):
        raise RuntimeError(
            f"PyTorch {torch.__version__} has no torch.export with dynamic sizes; it came with "
            "2.1. Update PyTorch, or export to TorchScript."
        )
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


def output_names(model: nn.Module, batch_size: int = 1, raw_heads: bool = False) -> List[str]:
    """Names of the tensors that an exported model returns, in their order.

    Args:
        model: what is exported.
        batch_size: N of the file.
        raw_heads: whether it is `RawHeads`.
    """
    if raw_heads:
        has_centerness = model.proposal_generator.head.centerness is not None
        return ["logits", "boxes"] + ["centerness"] * has_centerness
    names = ["boxes", "scores", "classes"]
    if isinstance(model, GeneralizedRCNN) and getattr(model.roi_heads, "mask_on", False):
        names.append("masks")
    return names + ["image_idxs"] * (batch_size > 1)


def example_images(model: nn.Module, batch_size: int, size: Size) -> Tensor:
    """(N, 3, H, W) noise in 0..255 on the device of the model, always the same."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(batch_size, 3, *size, generator=generator) * 255
    return noise.to(model.pixel_mean.device)


def _normalize_and_pad(model: ATSSDetector, images: Tensor) -> Tensor:
    """`preprocess_image` for images of one size: (N, 3, H, W) to a multiple of 32 pixels."""
    images = (images - model.pixel_mean) / model.pixel_std
    divisor = max(model.backbone.size_divisibility, 1)
    height, width = images.shape[-2], images.shape[-1]
    # Written as multiple minus size, so that the padded size is known to be a multiple.
    pad_height = (height + divisor - 1) // divisor * divisor - height
    pad_width = (width + divisor - 1) // divisor * divisor - width
    return F.pad(images, [0, pad_width, 0, pad_height])


def _detect_as_tensors(model: nn.Module, images: Tensor) -> Tuple[Tensor, ...]:
    """What the model's own `forward` finds, before any resize of boxes to another image."""
    inputs = [{"image": image} for image in images.unbind()]
    if isinstance(model, GeneralizedRCNN):
        results = model.inference(inputs, do_postprocess=False)
    else:
        results = [output["instances"] for output in model(inputs)]
    return _join([_fields(result) for result in results])


def _fields(result: Instances) -> Tuple[Tensor, ...]:
    fields = (result.pred_boxes.tensor, result.scores, result.pred_classes)
    return fields + ((result.pred_masks,) if result.has("pred_masks") else ())


def _join(results: List[Tuple[Tensor, ...]]) -> Tuple[Tensor, ...]:
    """Tensors of several images one after the other, and which image each entry belongs to."""
    if len(results) == 1:
        return results[0]
    image_idxs = [torch.full_like(result[2], i) for i, result in enumerate(results)]
    return tuple(torch.cat(parts) for parts in zip(*results)) + (torch.cat(image_idxs),)


def _frozen_copy(model: nn.Module, two_stage: bool = False) -> nn.Module:
    known = (ATSSDetector, GeneralizedRCNN) if two_stage else (ATSSDetector,)
    if (
        not isinstance(model, known)
        or getattr(model, "roi_heads", None) is not None
        and (getattr(model.roi_heads, "keypoint_on", False))
    ):
        raise TypeError(
            f"{type(model).__name__} cannot be exported this way: an ATSSDetector can in every "
            "format, a GeneralizedRCNN with boxes or masks as TorchScript without raw heads."
        )
    return copy.deepcopy(model).eval().requires_grad_(False)


def _size_oblivious():
    """Else sizes of 1, such as P7 of a small image, count as another program than larger ones."""
    try:
        import torch.fx.experimental._config as config
    except ImportError:
        return contextlib.nullcontext()
    if hasattr(config, "backed_size_oblivious"):
        return config.patch(backed_size_oblivious=True)
    return contextlib.nullcontext()


def _unfreeze_devices(traced: torch.jit.ScriptModule) -> None:
    """Let every graph ask one of its inputs for the device, instead of the example's.

    Our own code leaves no device in a trace; Detectron2's ROI heads do, in 0.5 in many places.
    """
    for module in traced.modules():
        try:
            graph = module.graph
        except RuntimeError:
            continue  # no forward: a list of modules
        constants = [
            node
            for node in graph.findAllNodes("prim::Constant", recurse=True)
            if str(node.output().type()) == "Device"
        ]
        if not constants:
            continue
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
