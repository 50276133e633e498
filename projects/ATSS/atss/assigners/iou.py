"""RetinaNet's rule: fixed thresholds on IoU, with a band that nobody learns from between them."""

from typing import Sequence, Tuple

import torch
from torch import Tensor

from detectron2.structures import Boxes

from ..anchors import Anchors, concatenate_anchors
from ..geometry import box_centers, centers_inside
from .assignment import Assignment, assign_all_anchors, concatenate_boxes
from .pairwise import DEFAULT_BUDGET, check_budget, check_margin, chunks, pairwise_ious


class IoUAssigner:
    """Positive from the upper threshold, ignored between the two, background below (Sec. 3.3).

    Decides as Detectron2's `Matcher`, so an anchor that is only some object's best match learns the
    object it overlaps most, as in Detectron2's RetinaNet. Unlike there, an object that overlaps no
    anchor at all (one without area, or far outside) claims none: there, all its IoUs of 0 tie for
    the best one and every anchor of the image becomes positive. Nothing waits for the GPU.

    Args:
        thresholds: (low, high) IoU, 0 < low <= high <= 1. Equal ones leave no band.
        allow_low_quality_matches: the anchors of highest IoU with an object are positive whatever
            that IoU is, ties included.
        center_in_gt: ignore positives whose centre is not inside their object (Table 1, row 4), as
            the authors' release does.
        center_margin: least distance in pixels from such a centre to every side, exclusive.
        budget: float32 values held at once; work that needs more goes through the anchors in
            chunks.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        thresholds: Sequence[float] = (0.4, 0.5),
        allow_low_quality_matches: bool = True,
        center_in_gt: bool = False,
        center_margin: float = 0.01,
        budget: int = DEFAULT_BUDGET,
    ):
        thresholds = [float(threshold) for threshold in thresholds]
        if len(thresholds) != 2 or not 0 < thresholds[0] <= thresholds[1] <= 1:
            raise ValueError(
                "IoUAssigner needs two thresholds (low, high) with 0 < low <= high <= 1, got "
                f"{thresholds}. Change model.assigner.thresholds."
            )
        self.thresholds = tuple(thresholds)
        self.allow_low_quality_matches = allow_low_quality_matches
        self.center_in_gt = center_in_gt
        self.center_margin = check_margin("IoUAssigner", center_margin)
        self.budget = check_budget("IoUAssigner", budget)

    def __call__(self, anchors: Anchors, gt_boxes: Sequence[Boxes]) -> Assignment:
        """Assign the anchors of a batch, image by image.

        Args:
            anchors: anchors of one padded image size, as a grid or as L `Boxes`.
            gt_boxes: N `Boxes`, one per image, in the same frame.

        Returns:
            `Assignment` of S = N * R samples, with ignored anchors.
        """
        anchor_boxes = concatenate_anchors(anchors)  # (R, 4)
        num_objects = [len(b) for b in gt_boxes]
        size = (len(gt_boxes), len(anchor_boxes))
        object_idxs = torch.zeros(size, dtype=torch.int64, device=anchor_boxes.device)
        is_positive = torch.zeros(size, dtype=torch.bool, device=anchor_boxes.device)
        is_ignored = torch.zeros_like(is_positive)
        boxes = concatenate_boxes(gt_boxes, anchor_boxes.device)
        first = 0
        for i, image_boxes in enumerate(boxes.split(num_objects)):
            if len(image_boxes) > 0:
                matches, is_positive[i], is_ignored[i] = self._match(image_boxes, anchor_boxes)
                object_idxs[i] = matches + first
            first += len(image_boxes)
        can_ignore = self.center_in_gt or self.thresholds[0] < self.thresholds[1]
        is_ignored = is_ignored if can_ignore else None
        return assign_all_anchors(object_idxs, is_positive, num_objects, is_ignored)

    def _match(self, boxes: Tensor, anchors: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Object (R,) int64, and whether positive and ignored, of every anchor of an image."""
        # Three matrices in pairwise_ious; what follows needs fewer.
        ranges = list(chunks(len(anchors), 3 * len(boxes), self.budget))
        best = torch.zeros(len(boxes), 1, device=boxes.device)  # highest IoU of each object
        for first, last in ranges if self.allow_low_quality_matches else ():
            ious = boxes.new_empty(len(boxes), last - first)
            pairwise_ious(boxes, anchors[first:last], ious)
            best = torch.maximum(best, ious.amax(dim=1, keepdim=True))
        # No IoU equals this: an object that overlaps nothing has no best anchor.
        best = best.masked_fill_(best == 0, -1)

        matches, highest, is_best = [], [], []
        for first, last in ranges:
            ious = boxes.new_empty(len(boxes), last - first)
            pairwise_ious(boxes, anchors[first:last], ious)
            is_best.append((ious == best).any(dim=0))
            values, idxs = ious.max(dim=0)
            highest.append(values)
            matches.append(idxs)
        matches, highest, is_best = torch.cat(matches), torch.cat(highest), torch.cat(is_best)

        low, high = self.thresholds
        is_positive = (highest >= high) | is_best
        is_ignored = (highest >= low) & ~is_positive
        if self.center_in_gt:
            is_inside = centers_inside(box_centers(anchors), boxes[matches], self.center_margin)
            is_ignored |= is_positive & ~is_inside
            is_positive &= is_inside
        return matches, is_positive, is_ignored
