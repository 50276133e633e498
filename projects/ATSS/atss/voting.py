"""Which box do several views of an object agree on? Box voting for test-time augmentation.

NMS keeps the best box of a pile and throws the others away. Voting averages the pile, weighted by
score, so that views which see the same object a little differently sharpen its edges.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from .geometry import box_areas, box_centers
from .postprocessing import Candidates

__all__ = ["VoteGroups", "group_boxes", "vote_boxes"]

# Members are compared with the heads near them in blocks of this many: few enough to lie close
# together, enough to keep a device busy.
_CHUNK = 256
# A block of at most this many pairs is compared at once, without looking for what is near.
_DENSE_PAIRS = 200_000
# Most pairs compared at once, whatever the boxes look like: bounds the memory (about 200 MB).
_MAX_PAIRS = 4_000_000


class VoteGroups(NamedTuple):
    """Boxes of one class, sorted into groups.

    Attributes:
        heads: (H,) int64 index of the best box of each group, by falling score.
        group: (D,) int64 group of each box.
        ious: (D,) IoU of each box with the head of its group; 1 for heads.
    """

    heads: Tensor
    group: Tensor
    ious: Tensor


def group_boxes(boxes: Tensor, scores: Tensor, vote_thresh: float = 0.66) -> VoteGroups:
    """Group boxes of one class around the best of them.

    The rule is sequential: the best box left takes every box left whose IoU with it reaches the
    threshold, until none is left. So group heads are what NMS keeps at that threshold, and a box
    belongs to the first head it overlaps so far. Both are found without a loop over boxes.

    Args:
        boxes: (D, 4) xyxy in pixels, finite.
        scores: (D,); of equal scores the earlier box counts as better.
        vote_thresh: IoU at which a box joins a group, itself included, in (0, 1).

    Returns:
        `VoteGroups`.
    """
    order = scores.argsort(descending=True, stable=True)
    # NMS removes IoU > threshold, a group takes IoU >= threshold.
    nms_thresh = math.nextafter(vote_thresh, 0.0) if hasattr(math, "nextafter") else vote_thresh
    ranks = torch.arange(len(order), 0, -1, device=boxes.device, dtype=torch.float64)
    heads = order[nms(boxes[order], ranks.to(boxes.dtype), nms_thresh)]
    group = torch.full_like(order, -1)
    group[heads] = torch.arange(len(heads), device=boxes.device)
    ious = torch.ones_like(scores)
    members = (group < 0).nonzero().squeeze(1)
    if len(members):
        group[members], ious[members] = _first_heads(boxes[members], boxes[heads], vote_thresh)
    return VoteGroups(heads, group, ious)


def vote_boxes(
    candidates: Candidates,
    vote_thresh: float = 0.66,
    soft: bool = True,
    soft_score_thresh: float = 0.05,
) -> Candidates:
    """Replace every group of boxes of a class by its score-weighted mean.

    The mean has the best score of its group; a box that is alone stays exactly as it is. With
    `soft`, the boxes of a group come back at score * (1 - IoU with the best one), so a neighbour
    that was swallowed by mistake keeps a chance. Boxes or scores that are not finite are left out:
    they overlap with nothing, not even with themselves.

    Args:
        candidates: of one image, from all views, boxes in one frame.
        vote_thresh: IoU at which a box joins a group, itself included, in (0, 1).
        soft: bring group members back at a lower score.
        soft_score_thresh: least score of a box brought back.

    Returns:
        `Candidates` by falling score; more than came in is possible only with `soft`.

    Raises:
        ValueError: for a threshold outside (0, 1).

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 9.0]])
        >>> pile = Candidates(boxes, torch.tensor([0.75, 0.25]), torch.tensor([3, 3]))
        >>> vote_boxes(pile, soft=False).boxes
        tensor([[0.0000, 0.0000, 8.0000, 8.2500]])
    """
    if not 0.0 < vote_thresh < 1.0:
        raise ValueError(
            f"vote_boxes needs a vote_thresh in (0, 1), got {vote_thresh}. It is an IoU: "
            "TEST.AUG.VOTE_THRESH, or vote_thresh of ATSSWithTTA."
        )
    boxes, scores, classes = candidates
    is_finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)
    boxes, scores, classes = boxes[is_finite], scores[is_finite], classes[is_finite]
    # Sorted by class, a class is a slice; by score within, results are in their final order.
    order = scores.argsort(descending=True, stable=True)
    order = order[classes[order].argsort(stable=True)]
    boxes, scores, classes = boxes[order], scores[order], classes[order]
    counts = torch.unique_consecutive(classes, return_counts=True)[1].tolist()
    voted = []
    for boxes_of, scores_of, classes_of in zip(
        boxes.split(counts), scores.split(counts), classes.split(counts)
    ):
        voted.append(
            _vote_class(boxes_of, scores_of, classes_of, vote_thresh, soft, soft_score_thresh)
        )
    if not voted:
        return Candidates(boxes, scores, classes)
    joined = Candidates(*(torch.cat(parts) for parts in zip(*voted)))
    order = joined.scores.argsort(descending=True, stable=True)
    return Candidates(*(part[order] for part in joined))


def _vote_class(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    vote_thresh: float,
    soft: bool,
    soft_score_thresh: float,
) -> Candidates:
    groups = group_boxes(boxes, scores, vote_thresh)
    num_groups = len(groups.heads)
    # Double: a group may have thousands of members, and the sum comes in any order on a GPU.
    weights = scores.double()
    sums = torch.cat((boxes.double() * weights[:, None], weights[:, None]), dim=1)  # (D, 5)
    sums = sums.new_zeros(num_groups, 5).index_add_(0, groups.group, sums)
    sizes = torch.bincount(groups.group, minlength=num_groups)
    has_mean = (sizes > 1) & (sums[:, 4] > 0)
    means = (sums[:, :4] / sums[:, 4:]).to(boxes.dtype)
    voted = torch.where(has_mean[:, None], means, boxes[groups.heads])
    voted_scores, voted_classes = scores[groups.heads], classes[groups.heads]
    if not soft:
        return Candidates(voted, voted_scores, voted_classes)
    softened = scores * (1 - groups.ious)
    is_head = torch.zeros_like(classes, dtype=torch.bool)
    is_head[groups.heads] = True
    is_back = ~is_head & (softened >= soft_score_thresh)
    return Candidates(
        torch.cat((voted, boxes[is_back])),
        torch.cat((voted_scores, softened[is_back])),
        torch.cat((voted_classes, classes[is_back])),
    )


def _first_heads(boxes: Tensor, heads: Tensor, thresh: float):
    """First head that each box overlaps by at least `thresh`, as (M,) index and (M,) IoU.

    For an IoU of t, width and height may differ by a factor of t at most, and the centres by
    (1 - t) / 2t of the smaller width and height. So boxes are sorted to bring similar ones
    together, and each chunk of them is compared only with the heads that are near all of it.
    """
    if len(boxes) * len(heads) <= _DENSE_PAIRS:
        return _first_heads_dense(boxes, heads, torch.arange(len(heads), device=heads.device),
                                  thresh)  # fmt: skip
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
    octaves = (sizes.prod(dim=1).log2() / 2).round()
    stripes = (box_centers(boxes)[:, 1] / torch.exp2(octaves)).floor()
    order = box_centers(boxes)[:, 0].argsort()
    order = order[stripes[order].argsort(stable=True)]
    order = order[octaves[order].argsort(stable=True)]

    features = torch.cat((box_centers(heads), heads[:, 2:] - heads[:, :2]), dim=1)  # (H, 4)
    chunks = order.split(_CHUNK)
    lows, highs = [], []
    for chunk in chunks:
        low, high = _reach(boxes[chunk], thresh)
        lows.append(low)
        highs.append(high)
    group = torch.empty(len(boxes), dtype=torch.int64, device=boxes.device)
    ious = torch.empty_like(boxes[:, 0])
    for chunk, low, high in zip(chunks, lows, highs):
        is_near = ((features >= low) & (features <= high)).all(dim=1)
        near = is_near.nonzero().squeeze(1)
        group[chunk], ious[chunk] = _first_heads_dense(boxes[chunk], heads[near], near, thresh)
    return group, ious


def _reach(boxes: Tensor, thresh: float):
    """Bounds (4,) on centre and size of whatever overlaps one of the boxes by `thresh`."""
    centers, sizes = box_centers(boxes), boxes[:, 2:] - boxes[:, :2]
    # Slack for rounding; a looser bound only costs time.
    reach = sizes * ((1 - thresh) / (2 * thresh) * 1.001) + 1e-2
    low = torch.cat(((centers - reach).amin(dim=0), sizes.amin(dim=0) * thresh * 0.999 - 1e-2))
    high = torch.cat(((centers + reach).amax(dim=0), sizes.amax(dim=0) / thresh * 1.001 + 1e-2))
    return low, high


def _first_heads_dense(boxes: Tensor, heads: Tensor, head_idxs: Tensor, thresh: float):
    step = max(1, _MAX_PAIRS // max(1, len(heads)))
    group, ious = [], []
    head_areas = box_areas(heads)
    for rows in boxes.split(step):
        top_left = torch.maximum(rows[:, None, :2], heads[None, :, :2])
        overlap = torch.minimum(rows[:, None, 2:], heads[None, :, 2:]).sub_(top_left).clamp_(min=0)
        inter = overlap[..., 0] * overlap[..., 1]  # (rows, H)
        # The very operations of torchvision's NMS, so that both agree to the last bit.
        pairs = inter / (head_areas + box_areas(rows)[:, None] - inter)
        is_joined = pairs >= thresh
        first = is_joined.to(torch.uint8).argmax(dim=1)
        # NMS found a head for every member. Should a GPU's rounding differ, the nearest is it.
        nearest = pairs.nan_to_num(nan=0.0).argmax(dim=1)
        first = torch.where(is_joined.any(dim=1), first, nearest)
        group.append(head_idxs[first])
        ious.append(pairs.gather(1, first[:, None]).squeeze(1))
    return torch.cat(group), torch.cat(ious)
