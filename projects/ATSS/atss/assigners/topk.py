"""The top-k rule: a fixed number of positives for every object, over all levels together.

The plain alternative to letting the object's statistics decide.
"""

from typing import Sequence

import torch
from torch import Tensor

from detectron2.structures import Boxes

from ..anchor_grid import Anchors, concatenate_anchors
from ..checks import check_integer
from ..geometry import box_centers, center_distances, centers_inside, elementwise_iou
from .assignment import Assignment, concatenate_boxes, resolve_claims, sortable
from .pairwise import DEFAULT_BUDGET, check_budget, check_margin, chunk_size, pairwise_ious

# Weight of the distance against IoU: only to order anchors of the same IoU, in particular those of
# small objects that overlap none.
_DISTANCE_WEIGHT = 0.001


class TopKAssigner:
    """The k best anchors of each object over all levels, those of them inside it.

    Best by IoU - 0.001 * distance / (largest distance of the image), so that of equal IoUs the
    nearer anchor wins, then the smaller index. An anchor that several objects claim goes to the
    highest IoU, then to the earlier object. Nothing waits for the GPU.

    Args:
        topk: k, anchors per object (not times anchors per location).
        center_margin: least distance in pixels from a positive's centre to every side, exclusive.
        budget: float32 values held at once; work that needs more goes through the objects in
            chunks.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, topk: int = 9, center_margin: float = 0.01, budget: int = DEFAULT_BUDGET):
        self.topk = check_integer("TopKAssigner", "topk", topk, 1, "model.assigner.topk")
        self.center_margin = check_margin("TopKAssigner", center_margin)
        self.budget = check_budget("TopKAssigner", budget)

    def __call__(self, anchors: Anchors, gt_boxes: Sequence[Boxes]) -> Assignment:
        """Assign the anchors of a batch in one pass: S = M * k samples."""
        anchor_boxes = concatenate_anchors(anchors)  # (R, 4)
        boxes = concatenate_boxes(gt_boxes, anchor_boxes.device)  # (M, 4)
        num_objects = [len(b) for b in gt_boxes]
        images = boxes.split(num_objects or [0])  # of no images, one part without objects
        anchor_idxs = torch.cat([self._best_anchors(x, anchor_boxes) for x in images])  # (M, k)

        candidates = anchor_boxes[anchor_idxs]  # (M, k, 4)
        boxes = boxes.unsqueeze(1)
        is_claimed = centers_inside(box_centers(candidates), boxes, self.center_margin)
        ious = elementwise_iou(boxes, candidates)
        return resolve_claims(anchor_idxs, is_claimed, ious, num_objects, len(anchor_boxes))

    def _best_anchors(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """The k best anchors of each of the m objects of an image, best first: (m, k) int64."""
        topk = min(self.topk, len(anchors))
        idxs = torch.arange(len(anchors), device=anchors.device)
        if len(boxes) == 0:
            return idxs.new_zeros(0, topk)
        centers = box_centers(anchors)
        # At the peak: scores, and two matrices of int64.
        parts = boxes.split(chunk_size(5 * len(anchors), self.budget))

        furthest = torch.zeros((), device=anchors.device)
        for part in parts:
            distances = center_distances(box_centers(part).unsqueeze(1), centers)
            furthest = torch.maximum(furthest, distances.amax())
            del distances
        furthest = furthest.sqrt().clamp(min=torch.finfo(torch.float32).tiny)

        best = []
        for part in parts:
            penalties = center_distances(box_centers(part).unsqueeze(1), centers)
            penalties.sqrt_().div_(furthest).mul_(_DISTANCE_WEIGHT)
            scores = pairwise_ious(part, anchors).sub_(penalties)
            del penalties
            # The index in the low half orders equal scores alike on every device.
            keys = (sortable(scores) << 32).sub_(idxs)
            del scores
            keys = keys.topk(topk, dim=1).values  # (m, k)
            best.append(-keys & 0xFFFFFFFF)
        return torch.cat(best)
