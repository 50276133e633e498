"""Modules to export: a detector as a function of one tensor, up to its detections or less far.

Normalisation, padding, decoding and NMS are inside, so that a file needs none of our code.
"""

import copy
import os
from typing import List, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances

from ..anchor_grid import GraphBoxes
from ..backbone import padding_rule
from ..checks import check_choice
from ..detector import ATSSDetector
from ..postprocessing import SelectionInputs
from ..postprocessing.traceable import ClassNMS, move_like, nms_per_class
from ..predictions import DensePredictions, flatten_levels
from ..proposal_generator import ATSS

PathLike = Union[str, "os.PathLike[str]"]
ImageSize = Tuple[int, int]  # height, width

STAGES = ("features", "raw heads", "candidates", "detections")


class ExportableDetector(nn.Module):
    """The detector up to one of its stages, for images of one size, with plain tensors as output.

    Args:
        model: the detector; left as it is.
        stage: where it ends. "features": after the backbone. "raw heads": after the head, with
            boxes decoded; all shapes follow from that of the input. "candidates": before NMS.
            "detections": the end.
        nms: see `traceable.detect_in_graph`.

    Raises:
        TypeError: for a model that is not an `ATSSDetector`.
        ValueError: for another stage.
    """

    def __init__(
        self, model: ATSSDetector, stage: str = "detections", nms: ClassNMS = nms_per_class
    ):
        super().__init__()
        self.stage = check_choice("ExportableDetector", "stage", stage, STAGES)
        self.model = frozen_copy(model)
        self.nms = nms
        if stage == "candidates":
            self.nms = _keep_all
            self.model.proposal_generator.selector.detections_per_image = -1

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Run the stages.

        Args:
            images: (N, 3, H, W) float32 in 0..255, channels in the order of `input_format`.

        Returns:
            Features: L maps (N, C, Hi, Wi).
            Raw heads: see `raw_heads_as_tensors`.
            Candidates and detections: boxes (D, 4) xyxy in pixels of the input, scores (D,),
            classes (D,) int64, by falling score; with N > 1 image after image, and fourth
            image_idxs (D,) int64.
        """
        core = self.model.proposal_generator
        features = self.model.backbone(_normalize_and_pad(self.model, images))
        feature_list = [features[name] for name in core.in_features]
        if self.stage == "features":
            return tuple(feature_list)
        predictions = core.head(feature_list)
        anchors = core.anchor_generator._grid_anchors(feature_list)
        if self.stage == "raw heads":
            return raw_heads_as_tensors(core, predictions, anchors)
        boxes = [GraphBoxes(level) for level in anchors]
        image_sizes = [(images.shape[-2], images.shape[-1]) for _ in images.unbind()]
        inputs = SelectionInputs(predictions, boxes, image_sizes, core.decode)
        return join_images(core.selector.in_graph(inputs, self.nms))


def raw_heads_as_tensors(
    core: ATSS, predictions: DensePredictions, anchors: Sequence[Tensor]
) -> Tuple[Tensor, ...]:
    """What the head predicts for every anchor, without selection.

    Args:
        core: decodes the boxes.
        predictions: of the head.
        anchors: L tensors (Ri, 4), xyxy in pixels.

    Returns:
        logits (N, R, K), boxes (N, R, 4) decoded, xyxy in pixels and not clipped, and centerness
        (N, R) logits for a head that has it.
    """
    deltas = flatten_levels(predictions.deltas, predictions.num_anchors)
    all_anchors = torch.cat(list(anchors))
    boxes = torch.stack([core.decode(image_deltas, all_anchors) for image_deltas in deltas])
    outputs = (flatten_levels(predictions.logits, predictions.num_anchors), boxes)
    if predictions.quality is not None:
        outputs += (flatten_levels(predictions.quality, predictions.num_anchors).squeeze(2),)
    return outputs


def detect_as_tensors(model: nn.Module, images: Tensor) -> Tuple[Tensor, ...]:
    """What the model's own `forward` finds, before any resize of boxes to another image."""
    inputs = [{"image": image} for image in images.unbind()]
    if isinstance(model, GeneralizedRCNN):
        results = model.inference(inputs, do_postprocess=False)
    else:
        results = [output["instances"] for output in model(inputs)]
    return join_images([_fields(result) for result in results])


def join_images(results: Sequence[Tuple[Tensor, ...]]) -> Tuple[Tensor, ...]:
    """Tensors of several images one after the other, and which image each entry belongs to."""
    if len(results) == 1:
        return tuple(results[0])
    image_idxs = [torch.full_like(result[2], i) for i, result in enumerate(results)]
    return tuple(torch.cat(parts) for parts in zip(*results)) + (torch.cat(image_idxs),)


def output_names(model: nn.Module, batch_size: int = 1, stage: str = "detections") -> List[str]:
    """Names of the tensors that a file returns, in their order; see `export_torchscript`."""
    if stage == "features":
        return list(model.proposal_generator.in_features)
    if stage == "raw heads":
        has_centerness = model.proposal_generator.head.centerness is not None
        return ["logits", "boxes"] + ["centerness"] * has_centerness
    names = ["boxes", "scores", "classes"]
    if isinstance(model, GeneralizedRCNN) and getattr(model.roi_heads, "mask_on", False):
        names.append("masks")
    return names + ["image_idxs"] * (batch_size > 1)


def example_images(model: nn.Module, batch_size: int, size: ImageSize) -> Tensor:
    """(N, 3, H, W) noise in 0..255 on the device of the model, always the same."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(batch_size, 3, *size, generator=generator) * 255
    return noise.to(model.pixel_mean.device)


def frozen_copy(model: nn.Module, two_stage: bool = False) -> nn.Module:
    """A copy for evaluation without gradients.

    Raises:
        TypeError: for a model that is no `ATSSDetector`, nor a two-stage one if that will do.
    """
    known = (ATSSDetector, GeneralizedRCNN) if two_stage else (ATSSDetector,)
    has_keypoints = getattr(getattr(model, "roi_heads", None), "keypoint_on", False)
    if not isinstance(model, known) or has_keypoints:
        raise TypeError(
            f"{type(model).__name__} cannot be exported this way: an ATSSDetector can in every "
            "format, a GeneralizedRCNN with boxes or masks as TorchScript without raw heads."
        )
    return copy.deepcopy(model).eval().requires_grad_(False)


def _normalize_and_pad(model: ATSSDetector, images: Tensor) -> Tensor:
    """`preprocess_image` for images of one size: (N, 3, H, W) to a multiple of 32 pixels."""
    if torch.jit.is_tracing():
        images = move_like(images, model.pixel_mean)  # to where a user has put the file
    images = (images - model.pixel_mean) / model.pixel_std
    divisor, _ = padding_rule(model.backbone)
    height, width = images.shape[-2], images.shape[-1]
    # Written as multiple minus size, so that the padded size is known to be a multiple.
    pad_height = (height + divisor - 1) // divisor * divisor - height
    pad_width = (width + divisor - 1) // divisor * divisor - width
    return F.pad(images, [0, pad_width, 0, pad_height])


def _keep_all(boxes: Tensor, ranks: Tensor, classes: Tensor, nms_thresh: float) -> Tensor:
    """NMS that suppresses nothing; boxes come best first."""
    return torch.ones_like(classes).cumsum(0) - 1


def _fields(result: Instances) -> Tuple[Tensor, ...]:
    fields = (result.pred_boxes.tensor, result.scores, result.pred_classes)
    return fields + ((result.pred_masks,) if result.has("pred_masks") else ())
