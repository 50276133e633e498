"""Training targets: what samples have to learn, and the checks of the ground truth."""

from dataclasses import dataclass
from typing import List, Optional, Sequence, Union

import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances

from .anchor_grid import Anchors
from .assigners import Assigner, Assignment, PredictionAssigner
from .assigners.assignment import concatenate_boxes
from .device import to_device
from .geometry import box_centers, ltrb_distances
from .predictions import PredictionsAt

# Pixels; a coordinate beyond is an error, and the areas of such boxes would overflow.
_FURTHEST = 1e6


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
        with torch.autocast(anchors.device.type, enabled=False):
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


def check_gt_instances(instances: Instances, num_classes: int, image_id: Optional[object]) -> None:
    """Refuse ground truth that would turn into NaN losses or a CUDA assertion later.

    Only looks at ground truth that is still on the host: there it costs microseconds, on a GPU it
    would wait for all queued work.

    Args:
        instances: `gt_boxes` xyxy in pixels and `gt_classes` of one image.
        num_classes: K.
        image_id: how the message names the image.

    Raises:
        ValueError: naming the image, the object and its values.
    """
    boxes = instances.gt_boxes.tensor
    if boxes.device.type != "cpu" or len(boxes) == 0:
        return
    # Not the other way round: comparisons with NaN are false.
    is_bad = ~(boxes.abs() <= _FURTHEST).all(dim=1) | (boxes[:, 2:] < boxes[:, :2]).any(dim=1)
    if is_bad.any():
        i = int(is_bad.nonzero()[0])
        raise ValueError(
            f"Ground-truth box {i} of image {image_id!r} is {boxes[i].tolist()}; boxes need finite "
            f"x1 <= x2 and y1 <= y2 in pixels, within {_FURTHEST:.0f} px. Check the annotations "
            "and the augmentations."
        )
    classes = instances.gt_classes
    is_bad = (classes < 0) | (classes >= num_classes)
    if is_bad.any():
        i = int(is_bad.nonzero()[0])
        raise ValueError(
            f"Object {i} of image {image_id!r} has class {int(classes[i])}, but the model has "
            f"{num_classes} classes (0 to {num_classes - 1}). Change model.num_classes "
            "(MODEL.ATSS.NUM_CLASSES) or the annotations."
        )


def boxes_on_host(gt_instances: Sequence[Instances]) -> Optional[List[Boxes]]:
    """Ground-truth boxes as the loader gives them, if they are on the CPU."""
    gt_boxes = [instances.gt_boxes for instances in gt_instances]
    is_on_host = all(boxes.tensor.device.type == "cpu" for boxes in gt_boxes)
    return gt_boxes if is_on_host else None
