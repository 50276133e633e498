"""SimOTA: each object takes the anchors that predict it at the least cost (YOLOX, Sec. 2.1)."""

from typing import Optional, Sequence

import torch
from torch import Tensor

from detectron2.structures import Boxes

from ..anchor_grid import AnchorGrid
from ..checks import check_integer, check_range
from ..geometry import box_centers, elementwise_iou
from ..predictions import PredictionsAt
from .assignment import Assignment, concatenate_boxes, images_of_objects, resolve_claims
from .candidates import within_radius_on_lattice
from .costs import cheapest, class_cost


class SimOTAAssigner:
    """Simplified optimal transport assignment (Ge et al., arXiv:2107.08430).

    Candidates of an object are the anchors less than `center_radius` strides from its centre on
    both axes. It takes the k cheapest, k being the sum of its `candidate_topk` best IoUs, rounded
    down, at least 1. The cost is binary cross-entropy over all classes of sqrt(class * quality),
    plus `iou_weight` times -log IoU of the predicted box. An anchor that several objects take goes
    to the lowest cost, then to the earlier object; its soft label is the IoU.

    The official code also lets an object count, and at a high cost take, candidates of other
    objects of the image, and gives an anchor taken twice to the cheapest of all objects, whether
    that one took it or not; here an object's own candidates are all it sees.

    Args:
        center_radius: in strides.
        candidate_topk: how many IoUs are summed.
        iou_weight: weight of the box in the cost.

    Raises:
        ValueError: if an argument is out of range.
    """

    uses_predictions = True

    def __init__(
        self, center_radius: float = 1.5, candidate_topk: int = 10, iou_weight: float = 3.0
    ):
        owner, node = "SimOTAAssigner", "model.assigner"
        key = f"{node}.center_radius"
        check_range(owner, "center_radius", center_radius, 0, 16, key, ends="(]")
        check_integer(owner, "candidate_topk", candidate_topk, 1, f"{node}.candidate_topk")
        check_range(owner, "iou_weight", iou_weight, 0, key=f"{node}.iou_weight")
        self.center_radius = center_radius
        self.candidate_topk = candidate_topk
        self.iou_weight = iou_weight

    def __call__(
        self,
        anchors: AnchorGrid,
        gt_boxes: Sequence[Boxes],
        *,
        gt_classes: Sequence[Tensor],
        predictions: PredictionsAt,
        gt_boxes_on_host: Optional[Sequence[Boxes]] = None,
    ) -> Assignment:
        """Assign the anchors of a batch in one pass: see `PredictionAssigner`."""
        num_objects = [len(boxes) for boxes in gt_boxes]
        boxes = concatenate_boxes(gt_boxes, anchors.device)  # (M, 4)
        candidates, is_candidate = within_radius_on_lattice(
            anchors, box_centers(boxes), self.center_radius
        )
        anchor_idxs = candidates.anchor_idxs  # (M, C)
        image_idxs = images_of_objects(num_objects, anchors.device)  # (M,)
        samples = image_idxs.unsqueeze(1).expand_as(anchor_idxs).reshape(-1), anchor_idxs.view(-1)
        classes = torch.cat(list(gt_classes)).to(anchors.device)
        classes = classes.unsqueeze(1).expand_as(anchor_idxs).reshape(-1)

        pred_boxes = predictions.boxes(*samples).view(*anchor_idxs.shape, 4)
        ious = elementwise_iou(boxes.unsqueeze(1), pred_boxes)  # (M, C)
        cost = class_cost(predictions, samples, classes).view(ious.shape)
        cost = cost - self.iou_weight * torch.log(ious + 1e-8)
        is_claimed = cheapest(cost, ious, is_candidate, self.candidate_topk)
        assignment = resolve_claims(
            anchor_idxs, is_claimed, -cost, num_objects, anchors.num_anchors, image_idxs
        )
        assignment.class_targets = ious.view(-1)
        return assignment
