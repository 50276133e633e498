"""What is in an exported file? The detector as a function of one tensor, with tensors as answer.

Normalisation, padding, decoding and NMS are inside, so that a file needs none of our code.
"""

import copy
import os
from typing import List, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances

from ..anchors import GraphBoxes
from ..detector import ATSSDetector
from ..postprocessing.traceable import ClassNMS, nms_per_class
from ..predictions import flatten_levels

__all__ = [
    "ExportableDetector",
    "RawHeads",
    "detect_as_tensors",
    "example_images",
    "frozen_copy",
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
        self.model = frozen_copy(model)
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
        results = core.selector.in_graph(
            core.head(feature_list),
            [GraphBoxes(level) for level in anchors],
            [(images.shape[-2], images.shape[-1])] * len(images),
            core.decode,
            self.nms,
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
        self.model = frozen_copy(model)

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
        boxes = torch.stack([core.decode(image_deltas, anchors) for image_deltas in deltas])
        outputs = (flatten_levels(predictions.logits, num_anchors), boxes)
        if predictions.quality is not None:
            outputs += (flatten_levels(predictions.quality, num_anchors).squeeze(2),)
        return outputs


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


def detect_as_tensors(model: nn.Module, images: Tensor) -> Tuple[Tensor, ...]:
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


def frozen_copy(model: nn.Module, two_stage: bool = False) -> nn.Module:
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
