"""Training targets: what the samples of an assignment have to learn."""

from dataclasses import dataclass
from typing import Optional, Sequence, Union

import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances

from .anchors import Anchors
from .assigners import Assigner, Assignment, PredictionAssigner
from .assigners.assignment import concatenate_boxes
from .device import to_device
from .geometry import box_centers, ltrb_distances
from .predictions import PredictionsAt


@dataclass
class Targets:
    """Training targets of a batch.

    Attributes:
        assignment: S samples, each an object and an anchor.
        classes: (S,) int64 in 0..K-1, class of the object; of any object where not positive.
        boxes: (S, 4) float32, box of the object, xyxy in pixels; of any object where not positive.
    """

    assignment: Assignment
    classes: Tensor
    boxes: Tensor


@torch.no_grad()
def label_anchors(
    assigner: Union[Assigner, PredictionAssigner],
    anchors: Anchors,
    gt_instances: Sequence[Instances],
    num_classes: int,
    predictions: Optional[PredictionsAt] = None,
    gt_boxes_on_host: Optional[Sequence[Boxes]] = None,
    box_offset: float = 0.0,
) -> Targets:
    """Assign the anchors of a batch and look up what each sample has to learn.

    Args:
        assigner: rule of axis 1, called once for the batch.
        anchors: anchors of the padded images.
        gt_instances: N `Instances` with `gt_boxes` and, unless `num_classes` is 1, `gt_classes`.
        num_classes: K. With 1 all objects are of class 0, as a proposal generator wants them.
        predictions: for rules that look at them.
        gt_boxes_on_host: the same boxes on the CPU where somebody has them, for those rules.
        box_offset: pixels that decoded boxes are moved by in evaluation; what the network has to
            say lies as far up and left of the truth.

    Returns:
        `Targets` of S samples.
    """
    gt_boxes = _moved_back([instances.gt_boxes for instances in gt_instances], box_offset)
    if num_classes == 1:
        gt_classes = [boxes.tensor.new_zeros(len(boxes), dtype=torch.int64) for boxes in gt_boxes]
    else:
        gt_classes = [instances.gt_classes.to(torch.int64) for instances in gt_instances]
    if getattr(assigner, "uses_predictions", False):
        assert predictions is not None, f"{type(assigner).__name__} looks at predictions"
        with torch.autocast(gt_boxes[0].device.type, enabled=False):
            assignment = assigner(
                anchors,
                gt_boxes,
                gt_classes=gt_classes,
                predictions=predictions,
                gt_boxes_on_host=gt_boxes_on_host and _moved_back(gt_boxes_on_host, box_offset),
            )
    else:
        assignment = assigner(anchors, gt_boxes)
    object_idxs = assignment.object_idxs
    boxes = concatenate_boxes(gt_boxes, object_idxs.device)
    classes = torch.cat([to_device(x, object_idxs.device) for x in gt_classes])
    return Targets(assignment, classes[object_idxs], boxes[object_idxs])


def _moved_back(gt_boxes: Sequence[Boxes], offset: float) -> Sequence[Boxes]:
    return [Boxes(boxes.tensor - offset) for boxes in gt_boxes] if offset else gt_boxes


def centerness_targets(anchors: Tensor, boxes: Tensor) -> Tensor:
    """How central the anchor's centre is in its object (FCOS, Eq. 3).

    Args:
        anchors: (..., 4) anchors xyxy in pixels.
        boxes: (..., 4) object boxes xyxy in pixels.

    Returns:
        (...) sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) in [0, 1]: 1 in the middle, 0 on
        an edge. Distances are clamped at 0: a centre outside has 0, not the plain formula's NaN.
    """
    distances = ltrb_distances(box_centers(anchors), boxes).clamp(min=0)
    least = torch.minimum(distances[..., :2], distances[..., 2:])
    most = torch.maximum(distances[..., :2], distances[..., 2:])
    tiny = torch.finfo(most.dtype).tiny  # a centre in the corner of an empty box: 0, not 0 / 0
    horizontal, vertical = (least / most.clamp(min=tiny)).unbind(dim=-1)
    return (horizontal * vertical).sqrt()
