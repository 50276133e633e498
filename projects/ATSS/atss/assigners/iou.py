"""RetinaNet's rule: fixed thresholds on IoU, with a band that nobody learns from between them."""

import functools
from typing import Sequence, Tuple

import torch
from torch import Tensor

from detectron2.structures import Boxes

from ..anchor_grid import Anchors, concatenate_anchors
from ..geometry import box_centers, centers_inside
from .assignment import Assignment
from .pairwise import (
    DEFAULT_BUDGET,
    assign_image_by_image,
    check_budget,
    check_center_in_gt,
    check_margin,
    chunk_size,
    pairwise_ious,
)


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
        try:
            low, high = (float(threshold) for threshold in thresholds)
            is_band = 0 < low <= high <= 1
        except (TypeError, ValueError):
            is_band = False
        if not is_band:
            raise ValueError(
                "IoUAssigner needs two thresholds (low, high) with 0 < low <= high <= 1, got "
                f"{thresholds}. Change model.assigner.thresholds."
            )
        self.thresholds = (low, high)
        self.allow_low_quality_matches = allow_low_quality_matches
        self.center_in_gt = check_center_in_gt("IoUAssigner", center_in_gt)
        self.center_margin = check_margin("IoUAssigner", center_margin)
        self.budget = check_budget("IoUAssigner", budget)

    def __call__(self, anchors: Anchors, gt_boxes: Sequence[Boxes]) -> Assignment:
        """Assign the anchors of a batch, image by image: S = N * R samples."""
        boxes = concatenate_anchors(anchors)  # (R, 4)
        can_ignore = self.center_in_gt or self.thresholds[0] < self.thresholds[1]
        match = functools.partial(self._match, anchors=boxes)
        return assign_image_by_image(gt_boxes, len(boxes), boxes.device, match, can_ignore)

    def _match(self, boxes: Tensor, anchors: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Object (R,) int64, and whether positive and ignored, of every anchor of an image."""
        # Three matrices in pairwise_ious; what follows needs fewer.
        parts = anchors.split(chunk_size(3 * len(boxes), self.budget))
        best = torch.zeros(len(boxes), 1, device=boxes.device)  # highest IoU of each object
        for part in parts if self.allow_low_quality_matches else ():
            best = torch.maximum(best, pairwise_ious(boxes, part).amax(dim=1, keepdim=True))
        # No IoU equals this: an object that overlaps nothing has no best anchor.
        best = best.masked_fill_(best == 0, -1)

        matches, highest, is_best = [], [], []
        for part in parts:
            ious = pairwise_ious(boxes, part)  # (m, r)
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
