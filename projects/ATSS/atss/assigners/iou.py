"""Which anchors overlap an object enough? (RetinaNet)

Fixed thresholds on IoU, with a band between background and positive that nobody learns from.
"""

from typing import Sequence, Tuple, Union

import torch
from torch import Tensor

from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes

from ..anchors import AnchorGrid, concatenate_anchors
from ..geometry import box_centers, centers_inside
from .assignment import Assignment, concatenate_boxes
from .pairwise import DEFAULT_BUDGET, check_budget, chunks, pairwise_ious

__all__ = ["IoUAssigner"]


class IoUAssigner:
    """Positive from the upper threshold, ignored between the two, background below (Sec. 3.2).

    Detectron2's `Matcher` decides, so an anchor that is only some object's best match learns the
    object it overlaps most, as in Detectron2's RetinaNet. Unlike there, an object that overlaps no
    anchor at all (one without area, or far outside) claims none: there, all its IoUs of 0 tie for
    the best one and every anchor of the image becomes positive.

    `Matcher` waits for the GPU, so this rule does.

    Args:
        thresholds: (low, high) IoU, 0 < low <= high <= 1. Equal ones leave no band.
        allow_low_quality_matches: the anchors of highest IoU with an object are positive whatever
            that IoU is, ties included.
        center_in_gt: ignore positives whose centre is not inside their object (Table 1, row 4), as
            the authors' release does.
        center_margin: least distance in pixels from such a centre to every side, itself excluded.
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
        self.center_margin = center_margin
        self.budget = check_budget("IoUAssigner", budget)
        self._matcher = Matcher(thresholds, [0, -1, 1], allow_low_quality_matches)

    def __call__(
        self, anchors: Union[AnchorGrid, Sequence[Boxes]], gt_boxes: Sequence[Boxes]
    ) -> Assignment:
        """Assign the anchors of a batch, image by image.

        Args:
            anchors: anchors of one padded image size, as a grid or as L `Boxes`.
            gt_boxes: N `Boxes`, one per image, in the same frame.

        Returns:
            `Assignment` of shape (N, R).
        """
        anchor_boxes = concatenate_anchors(anchors)  # (R, 4)
        size = (len(gt_boxes), len(anchor_boxes))
        matched_idxs = torch.zeros(size, dtype=torch.int64, device=anchor_boxes.device)
        match_labels = torch.zeros(size, dtype=torch.int8, device=anchor_boxes.device)
        boxes = concatenate_boxes(gt_boxes, anchor_boxes.device)
        for i, image_boxes in enumerate(boxes.split([len(b) for b in gt_boxes])):
            if len(image_boxes) > 0:
                matched_idxs[i], match_labels[i] = self._match(image_boxes, anchor_boxes)
        return Assignment(matched_idxs, match_labels)

    def _match(self, boxes: Tensor, anchors: Tensor) -> Tuple[Tensor, Tensor]:
        """Object (R,) int64 and label (R,) int8 of every anchor of an image."""
        # Three matrices in pairwise_ious; `Matcher` works with fewer.
        ranges = list(chunks(len(anchors), 3 * len(boxes), self.budget))
        best = torch.zeros(len(boxes), device=boxes.device)  # (M,) highest IoU of each object
        for first, last in ranges:
            ious = boxes.new_empty(len(boxes), last - first)
            best = torch.maximum(best, pairwise_ious(boxes, anchors[first:last], ious).amax(dim=1))
        touching = (best > 0).nonzero().squeeze(1)
        boxes, best = boxes[touching], best[touching]

        matches, labels = [], []
        for first, last in ranges:
            size = last - first
            # `Matcher` sees a chunk only, so each object brings its best IoU along: on an anchor
            # of its own behind the chunk.
            ious = torch.zeros(len(boxes), size + len(boxes), device=boxes.device)
            pairwise_ious(boxes, anchors[first:last], ious[:, :size])
            ious[:, size:].diagonal().copy_(best)
            chunk_matches, chunk_labels = self._matcher(ious)
            matches.append(chunk_matches[:size])
            labels.append(chunk_labels[:size])
        match_labels = torch.cat(labels)
        if len(boxes) == 0:
            return torch.cat(matches), match_labels
        matches = torch.cat(matches)
        if self.center_in_gt:
            is_inside = centers_inside(box_centers(anchors), boxes[matches], self.center_margin)
            match_labels = match_labels.masked_fill((match_labels == 1) & ~is_inside, -1)
        return touching[matches], match_labels
