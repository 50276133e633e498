"""Are two lists of detections the same? Rounding may change an order, but not what is found.

Two programs that compute the same thing round differently, by about 1e-6 in a score. Of two boxes
on the same object whose scores agree to that, either may suppress the other, and what the loser
had suppressed comes back. Such ties are told from mistakes here: whatever one side lacks must have
lost, on the other side, to a box that is as good.
"""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

__all__ = ["BOX_TOLERANCE", "SCORE_TOLERANCE", "Choice", "Match", "match_detections"]

BOX_TOLERANCE = 0.01  # pixels
SCORE_TOLERANCE = 1e-4
TIE_TOLERANCE = 1e-5  # of scores
IOU_TOLERANCE = 1e-4  # of being suppressed


class Choice(NamedTuple):
    """How the model chose its detections of one image.

    Attributes:
        candidates: boxes (C, 4), scores (C,) and classes (C,) before suppression.
        nms_thresh: IoU above which the lower score goes, per class.
        max_detections: how many are kept; negative keeps all.
    """

    candidates: Sequence[Tensor]
    nms_thresh: float
    max_detections: int


class Match(NamedTuple):
    """How two lists differ.

    Attributes:
        box_difference: largest of any coordinate, among partners, in pixels.
        score_difference: largest of any score, or value of a mask, among partners.
        num_ties: how many were chosen differently among equals.
        num_unmatched: those of either list without a partner, ties aside.
    """

    box_difference: float
    score_difference: float
    num_ties: int
    num_unmatched: int


def match_detections(
    expected: Sequence[Tensor], found: Sequence[Tensor], choice: Optional[Choice] = None
) -> Match:
    """Find each detection of one list in the other, whatever the order.

    Args:
        expected: boxes (D, 4), scores (D,), classes (D,) and maybe masks (D, 1, M, M) of an image.
        found: the same of the file.
        choice: without it nothing counts as a tie.
    """
    cost, box_distance, score_distance = _distances(expected, found)
    pairs = _partners(cost)
    rows, columns = [i for i, _ in pairs], [j for _, j in pairs]
    missing, extra = _without(expected, rows), _without(found, columns)
    num_unmatched, num_ties = len(missing[0]) + len(extra[0]), 0
    if choice is not None and num_unmatched:
        # What the file has in excess, the model must at least have considered.
        known = [i for i, _ in _partners(_distances(extra, choice.candidates)[0])]
        extra = [tensor[known] for tensor in extra]
        lost_there = _lost(missing, extra, found, choice)
        lost_here = _lost(extra, missing, expected, choice)
        ties = int(lost_there.sum()), int(lost_here.sum())
        num_ties, num_unmatched = max(ties), num_unmatched - sum(ties)
    return Match(
        float(box_distance[rows, columns].max()) if pairs else 0.0,
        float(score_distance[rows, columns].max()) if pairs else 0.0,
        num_ties,
        num_unmatched,
    )


def _distances(
    expected: Sequence[Tensor], found: Sequence[Tensor]
) -> Tuple[Tensor, Tensor, Tensor]:
    """(D, D') cost of each pair in units of what is allowed, distance of boxes, of scores."""
    box_distance = (expected[0][:, None].double() - found[0][None].double()).abs().amax(dim=2)
    score_distance = (expected[1][:, None].double() - found[1][None].double()).abs()
    if len(expected) > 3 and len(found) > 3:
        masks = [detections[3].flatten(1).double() for detections in (expected, found)]
        score_distance = score_distance.maximum(torch.cdist(*masks, p=float("inf")))
    cost = (box_distance / BOX_TOLERANCE).maximum(score_distance / SCORE_TOLERANCE)
    cost[expected[2][:, None] != found[2][None]] = float("inf")  # another class is no partner
    return cost, box_distance, score_distance


def _partners(cost: Tensor) -> List[Tuple[int, int]]:
    """Pairs of cost at most 1, each row and column used once."""
    pairs: List[Tuple[int, int]] = []
    cost = cost.clone()
    for i in range(len(cost) if cost.shape[1] else 0):
        j = int(cost[i].argmin())
        if cost[i, j] <= 1:
            pairs.append((i, j))
            cost[:, j] = float("inf")
    return pairs


def _without(detections: Sequence[Tensor], idxs: Sequence[int]) -> List[Tensor]:
    is_other = torch.ones(len(detections[0]), dtype=torch.bool)
    is_other[list(idxs)] = False
    return [tensor[is_other] for tensor in detections]


def _lost(
    missing: Sequence[Tensor], extra: Sequence[Tensor], others: Sequence[Tensor], choice: Choice
) -> Tensor:
    """Which of the detections that a list lacks may have lost to equals in that list.

    Args:
        missing: what the list lacks.
        extra: what it has instead.
        others: the list.
        choice: by which rule it was made.
    """

    def rivals(better: Sequence[Tensor]) -> Tuple[Tensor, Tensor]:
        is_rival = (missing[2][:, None] == better[2]) & (
            better[1] >= missing[1][:, None] - TIE_TOLERANCE
        )
        return is_rival, box_iou(missing[0], better[0]) - choice.nms_thresh

    is_rival, excess = rivals(extra)
    lost = (is_rival & (excess > -IOU_TOLERANCE)).any(dim=1)
    is_rival, excess = rivals(others)  # on the very edge of being suppressed
    lost |= (is_rival & (excess.abs() <= IOU_TOLERANCE)).any(dim=1)
    if len(others[1]) == choice.max_detections:  # or just not among the best
        lost |= missing[1] <= others[1].min() + TIE_TOLERANCE
    return lost
