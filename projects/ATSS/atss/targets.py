"""What should each anchor predict?

Turns the assignment (who learns whom) into the values that the losses compare with.
"""

from dataclasses import dataclass
from typing import Callable, Optional, Sequence, Union

import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances

from .anchors import AnchorGrid
from .assigners import Assignment, Claims
from .assigners.assignment import concatenate_boxes
from .geometry import box_centers, ltrb_distances

__all__ = ["Targets", "centerness_targets", "label_anchors"]


@dataclass
class Targets:
    """Training targets of a batch.

    Attributes:
        labels: (N, R) int64 class of each anchor: 0..K-1, K for background, -1 for ignore.
        boxes: (N, R, 4) box of the object each positive learns, xyxy in pixels; else undefined.
        claims: the positives in sparse form where the assigner gives one, so that losses of
            positives need not visit all anchors; else None.
    """

    labels: Tensor
    boxes: Tensor
    claims: Optional[Claims] = None


@torch.no_grad()
def label_anchors(
    assigner: Callable[[Union[AnchorGrid, Sequence[Boxes]], Sequence[Boxes]], Assignment],
    anchors: Union[AnchorGrid, Sequence[Boxes]],
    gt_instances: Sequence[Instances],
    num_classes: int,
) -> Targets:
    """Assign the anchors of a batch and look up what each has to learn.

    Args:
        assigner: rule of axis 1, called once for the batch.
        anchors: anchors of the padded images.
        gt_instances: N `Instances` with `gt_boxes` and, unless `num_classes` is 1, `gt_classes`.
        num_classes: K. With 1 all objects are of class 0, as a proposal generator wants them.

    Returns:
        `Targets` of shape (N, R).
    """
    assignment = assigner(anchors, [instances.gt_boxes for instances in gt_instances])
    if assignment.claims is not None:
        return _sparse_targets(assignment, gt_instances, num_classes)
    matched_idxs = assignment.matched_idxs  # (N, R)
    labels = torch.full_like(matched_idxs, num_classes)
    boxes = torch.zeros((*matched_idxs.shape, 4), device=matched_idxs.device)
    for i, instances in enumerate(gt_instances):
        if len(instances) == 0:
            continue
        boxes[i] = instances.gt_boxes.tensor[matched_idxs[i]]
        if num_classes == 1:
            labels[i] = 0
        else:
            labels[i] = instances.gt_classes[matched_idxs[i]]
    labels = labels.masked_fill(assignment.match_labels == 0, num_classes)
    labels = labels.masked_fill(assignment.match_labels < 0, -1)
    return Targets(labels, boxes)


def _sparse_targets(
    assignment: Assignment, gt_instances: Sequence[Instances], num_classes: int
) -> Targets:
    """The same from the claims of M objects, which visit their candidates only."""
    claims = assignment.claims
    num_images, num_anchors = assignment.matched_idxs.shape
    device = assignment.matched_idxs.device
    last = num_images * num_anchors
    # Candidates that are not positive write to an element behind the last, which is then dropped.
    gt_boxes = concatenate_boxes([x.gt_boxes for x in gt_instances], device)  # (M, 4)
    boxes = torch.empty((last + 1, 4), device=device)
    boxes[claims.places] = gt_boxes.unsqueeze(1)
    labels = torch.full((last + 1,), num_classes, device=device)
    if num_classes == 1 or len(gt_boxes) == 0:
        labels.index_fill_(0, claims.places.view(-1), 0)
    else:
        gt_classes = torch.cat([x.gt_classes for x in gt_instances])  # (M,)
        labels[claims.places] = gt_classes.unsqueeze(1)
    return Targets(
        labels[:last].view(num_images, num_anchors),
        boxes[:last].view(num_images, num_anchors, 4),
        claims,
    )


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
