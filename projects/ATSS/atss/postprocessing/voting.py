"""Box voting: the boxes of an object, found in several views, averaged by score.

NMS keeps the best box of a group and removes the others. Voting takes their mean, so that views
which see the same object a little differently sharpen its edges.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from ..geometry import elementwise_iou
from .selection import Detections

# Boxes are compared with heads in chunks of this many pairs, about the size of a cache.
_MAX_PAIRS = 100_000


class VoteGroups(NamedTuple):
    """Boxes sorted into G groups.

    Attributes:
        heads: (G,) int64 index of the best box of each group; by class, then by falling score.
        group: (D,) int64 group of each box, in 0..G-1.
        ious: (D,) float64 IoU of each box with the head of its group; 1 for heads.
    """

    heads: Tensor
    group: Tensor
    ious: Tensor


def group_boxes(
    boxes: Tensor, scores: Tensor, classes: Tensor, vote_thresh: float = 0.66
) -> VoteGroups:
    """Group boxes of the same class around the best of them.

    The rule is sequential: the best box left takes every box left whose IoU with it reaches the
    threshold, until none is left. So heads are what NMS keeps at that threshold, and every other
    box belongs to the best head that it overlaps that far.

    Args:
        boxes: (D, 4) xyxy in pixels, finite.
        scores: (D,); of equal scores the earlier box counts as better.
        classes: (D,) int64.
        vote_thresh: IoU at which a box joins a group, inclusive, in (0, 1).

    Returns:
        `VoteGroups`.
    """
    if not len(boxes):
        return VoteGroups(classes, classes, boxes[:, 0].double())
    # Each class has its own stripe, so that boxes of different classes do not overlap. In float64
    # and with a power of two, so that moving them does not round.
    boxes = boxes.double()
    span = 2.0 ** float((boxes.amax() - boxes.amin() + 1).log2().ceil())
    boxes = boxes + (classes.double() * span)[:, None] * boxes.new_tensor([1.0, 0.0, 1.0, 0.0])
    # NMS removes IoU > threshold, a group takes IoU >= threshold.
    heads = nms(boxes, scores.double(), float(np.nextafter(vote_thresh, 0.0)))
    heads = heads[classes[heads].argsort(stable=True)]  # (G,)
    group = torch.full_like(classes, -1)
    group[heads] = torch.arange(len(heads), device=heads.device)
    ious = torch.ones_like(boxes[:, 0])
    members = (group < 0).nonzero().squeeze(1)
    members = members[classes[members].argsort()]
    for rows in members.split(max(1, _MAX_PAIRS // len(heads))) if len(members) else ():
        first_class, last_class = classes[rows[0]], classes[rows[-1]]
        near = heads[(classes[heads] >= first_class) & (classes[heads] <= last_class)]
        pairs = elementwise_iou(boxes[rows, None], boxes[None, near])  # (d, g)
        # Each member has a head, says NMS; should its IoU be rounded otherwise, the nearest head.
        threshold = pairs.amax(dim=1, keepdim=True).clamp(max=vote_thresh)
        best = (pairs >= threshold).to(torch.uint8).argmax(dim=1, keepdim=True)  # the first
        group[rows] = group[near[best.squeeze(1)]]
        ious[rows] = pairs.gather(1, best).squeeze(1)
    return VoteGroups(heads, group, ious)


def vote_boxes(
    candidates: Detections,
    vote_thresh: float = 0.66,
    soft: bool = True,
    soft_score_thresh: float = 0.05,
) -> Detections:
    """Replace every group of boxes of a class by its score-weighted mean.

    The mean has the best score of its group; a box that is alone stays exactly as it is. With
    `soft`, the other boxes of a group come back at score * (1 - IoU with the best one), so that a
    neighbour which was grouped by mistake keeps a chance. Boxes and scores that are not finite are
    left out.

    Args:
        candidates: of one image, from all views, boxes in one frame.
        vote_thresh: IoU at which a box joins a group, inclusive, in (0, 1).
        soft: bring group members back at a lower score.
        soft_score_thresh: least score of a box brought back, inclusive.

    Returns:
        `Detections` by falling score, never more than came in.

    Raises:
        ValueError: for a threshold outside (0, 1).

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 9.0]])
        >>> found = Detections(boxes, torch.tensor([0.75, 0.25]), torch.tensor([3, 3]))
        >>> vote_boxes(found, soft=False).boxes
        tensor([[0.0000, 0.0000, 8.0000, 8.2500]])
    """
    if not 0.0 < vote_thresh < 1.0:
        raise ValueError(
            f"vote_boxes needs a vote_thresh in (0, 1), got {vote_thresh}. It is an IoU: "
            "TEST.AUG.VOTE_THRESH, or vote_thresh of ATSSWithTTA."
        )
    is_finite = torch.isfinite(candidates.boxes).all(dim=1) & torch.isfinite(candidates.scores)
    boxes, scores, classes = candidates.at(is_finite)
    heads, group, ious = group_boxes(boxes, scores, classes, vote_thresh)
    # In float64: a group may have thousands of members, and a GPU adds them in any order.
    weights = scores.double()
    sums = torch.cat((boxes.double() * weights[:, None], weights[:, None]), dim=1)  # (D, 5)
    sums = sums.new_zeros(len(heads), 5).index_add_(0, group, sums)  # (G, 5)
    has_mean = (torch.bincount(group, minlength=len(heads)) > 1) & (sums[:, 4] > 0)
    means = (sums[:, :4] / sums[:, 4:]).to(boxes.dtype)
    voted = Detections(
        torch.where(has_mean[:, None], means, boxes[heads]), scores[heads], classes[heads]
    )
    if soft:
        softened = (weights * (1 - ious)).to(scores.dtype)
        is_back = softened >= soft_score_thresh
        is_back[heads] = False
        back = Detections(boxes, softened, classes).at(is_back)
        voted = Detections(*(torch.cat(parts) for parts in zip(voted, back)))
    return voted.at(voted.scores.argsort(descending=True, stable=True))
