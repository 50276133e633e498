"""Comparison of two lists of detections that may differ by rounding.

Two programs that compute the same thing round differently, by about 1e-6 in a score. Of two boxes
on the same object whose scores agree to that, either may suppress the other, and what the loser had
suppressed comes back. So a list is also right if NMS could have left it: it holds candidates only,
no two of a class overlap, and each other candidate overlaps a box that is as good.
"""

import functools
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

BOX_TOLERANCE = 0.01  # pixels
SCORE_TOLERANCE = 1e-4
TIE_TOLERANCE = 1e-5  # of scores
IOU_TOLERANCE = 1e-4  # of being suppressed


class Suppression(NamedTuple):
    """How the model chose its detections of one image.

    Attributes:
        candidates: boxes (C, 4), scores (C,) and classes (C,) before NMS.
        nms_thresh: IoU above which the lower score is removed, per class.
        max_detections: how many are kept; negative keeps all.
    """

    candidates: Sequence[Tensor]
    nms_thresh: float
    max_detections: int

    def violations(self, found: Sequence[Tensor], candidate_idxs: Sequence[int]) -> int:
        """In how many places a list of candidates cannot be what NMS leaves, rounding aside.

        Args:
            found: boxes (D, 4), scores (D,) and classes (D,).
            candidate_idxs: D indices, which candidates they are.
        """
        is_found = torch.zeros(len(self.candidates[0]), dtype=torch.bool)
        is_found[list(candidate_idxs)] = True
        boxes, scores, classes = self.candidates
        ious = box_iou(boxes, found[0])  # (C, D)
        is_rival = classes[:, None] == found[2]
        is_better = is_rival & (found[1] >= scores[:, None] - TIE_TOLERANCE)
        is_out = (is_better & (ious > self.nms_thresh - IOU_TOLERANCE)).any(dim=1)
        if len(found[1]) == self.max_detections:  # or just not among the best
            is_out |= scores <= found[1].min() + TIE_TOLERANCE
        is_repeated = (found[2][:, None] == found[2]) & (
            box_iou(found[0], found[0]) > self.nms_thresh + IOU_TOLERANCE
        )
        return int((~is_found & ~is_out).sum()) + int(is_repeated.triu(1).sum())


class Difference(NamedTuple):
    """How the outputs of a file differ from those of the model.

    Attributes:
        boxes: largest difference of any coordinate, among partners, in pixels.
        scores: largest difference of any score, or value of a mask, among partners.
        num_ties: detections that were chosen differently among equals.
        num_unmatched: detections of either side without a partner, ties aside; of features and raw
            heads, how many outputs differ.
    """

    boxes: float
    scores: float
    num_ties: int
    num_unmatched: int

    @property
    def is_rounding(self) -> bool:
        """Everything has its partner, boxes within 0.01 px, scores within 1e-4, ties aside."""
        is_near = self.boxes <= BOX_TOLERANCE and self.scores <= SCORE_TOLERANCE
        return self.num_unmatched == 0 and is_near


def match_detections(
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    suppression: Optional[Suppression] = None,
) -> Difference:
    """Find each detection of one list in the other, whatever the order.

    Args:
        expected: boxes (D, 4), scores (D,), classes (D,) and maybe masks (D, 1, side, side)
            of an image.
        found: the same of the file.
        suppression: without it nothing counts as a tie.
    """
    pairs, boxes, scores = _partners(expected, found)
    num_missing, num_extra = len(expected[0]) - len(pairs), len(found[0]) - len(pairs)
    num_unmatched, num_ties = num_missing + num_extra, 0
    if suppression is not None and num_unmatched:
        # What the file has in excess, the model must at least have considered.
        known, boxes, scores = _partners(found, suppression.candidates)
        rows, candidate_idxs = [i for i, _ in known], [j for _, j in known]
        num_unknown = len(found[0]) - len(known)
        kept = [tensor[rows] for tensor in found]
        num_unmatched = num_unknown + suppression.violations(kept, candidate_idxs)
        num_ties = max(num_extra - num_unknown, num_missing)
    return Difference(boxes, scores, num_ties, num_unmatched)


def _partners(
    expected: Sequence[Tensor], found: Sequence[Tensor]
) -> Tuple[List[Tuple[int, int]], float, float]:
    """Pairs of one class within the tolerances, and how much their boxes and scores differ."""
    columns = zip(expected[0].double().unbind(dim=1), found[0].double().unbind(dim=1))
    boxes = functools.reduce(torch.maximum, ((a[:, None] - b).abs() for a, b in columns))
    scores = (expected[1][:, None].double() - found[1].double()).abs()
    if len(expected) > 3 and len(found) > 3:
        masks = [detections[3].flatten(1).double() for detections in (expected, found)]
        scores = scores.maximum(torch.cdist(*masks, p=float("inf")))
    cost = (boxes / BOX_TOLERANCE).maximum(scores / SCORE_TOLERANCE)  # (D, D')
    cost[expected[2][:, None] != found[2]] = float("inf")  # another class is no partner
    pairs: List[Tuple[int, int]] = []
    for i in range(len(cost) if cost.shape[1] else 0):
        j = int(cost[i].argmin())
        if cost[i, j] <= 1:
            pairs.append((i, j))
            cost[:, j] = float("inf")
    if not pairs:
        return pairs, 0.0, 0.0
    rows, columns = zip(*pairs)
    return pairs, float(boxes[rows, columns].max()), float(scores[rows, columns].max())
