"""Axis 3 of 4: losses of the boxes of positives, one value per sample."""

from typing import Union

import torch
from fvcore.nn import smooth_l1_loss
from torch import Tensor

from ..box_regression import Box2BoxTransform, PointToBoxTransform
from ..geometry import box_areas


def elementwise_giou_loss(boxes: Tensor, gt_boxes: Tensor, eps: float = 1e-7) -> Tensor:
    """1 - GIoU of each pair (Rezatofighi et al., 2019), in float32.

    fvcore's and torchvision's versions either wait for the GPU on a check of their input or fail
    under bfloat16 autocast.

    Args:
        boxes: (S, 4) predicted boxes xyxy in pixels.
        gt_boxes: (S, 4) boxes xyxy in pixels.
        eps: added to areas in denominators.

    Returns:
        (S,) losses in [0, 2].
    """
    boxes, gt_boxes = boxes.float(), gt_boxes.float()
    inner = torch.minimum(boxes[:, 2:], gt_boxes[:, 2:]) - torch.maximum(
        boxes[:, :2], gt_boxes[:, :2]
    )
    outer = torch.maximum(boxes[:, 2:], gt_boxes[:, 2:]) - torch.minimum(
        boxes[:, :2], gt_boxes[:, :2]
    )
    inner = inner.clamp(min=0)
    intersection = inner[:, 0] * inner[:, 1]
    union = box_areas(boxes) + box_areas(gt_boxes) - intersection + eps
    hull = outer[:, 0] * outer[:, 1] + eps
    return 1 - intersection / union + (hull - union) / hull


def elementwise_smooth_l1_loss(
    deltas: Tensor,
    anchors: Tensor,
    gt_boxes: Tensor,
    box2box_transform: Union[Box2BoxTransform, PointToBoxTransform],
    beta: float,
) -> Tensor:
    """Smooth L1 between predicted deltas and those of the truth, summed over the four.

    Args:
        deltas: (S, 4) predictions.
        anchors: (S, 4) anchors xyxy in pixels.
        gt_boxes: (S, 4) boxes xyxy in pixels.
        box2box_transform: what the deltas mean.
        beta: where the loss turns from quadratic to linear.

    Returns:
        (S,) losses.
    """
    gt_deltas = box2box_transform.get_deltas(anchors, gt_boxes)
    return smooth_l1_loss(deltas, gt_deltas, beta).sum(dim=-1)
