"""Which box do several views of an object agree on? Box voting for test-time augmentation.

NMS keeps the best box of a pile and throws the others away. Voting averages the pile, weighted by
score, so that views which see the same object a little differently sharpen its edges.
"""

from typing import List, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from ..geometry import box_areas, box_centers
from .eager import Detections

__all__ = ["VoteGroups", "group_boxes", "vote_boxes"]

# Boxes whose heads are found at once: more make NMS slower, fewer make more rounds.
_BLOCK = 2048
# Members are compared with the heads near them in chunks of this many: few enough to lie close
# together, enough to keep a device busy.
_CHUNK = 256
# Most pairs compared at once, whatever the boxes look like: bounds the memory (about 200 MB).
_MAX_PAIRS = 2_000_000


class VoteGroups(NamedTuple):
    """Boxes sorted into groups.

    Attributes:
        heads: (H,) int64 index of the best box of each group; within a class by falling score.
        group: (D,) int64 group of each box.
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
    threshold, until none is left. So among the best few left, group heads are what NMS keeps at
    that threshold, and every box left belongs to the first of them that it overlaps so far; those
    that overlap none go to the next round.

    Args:
        boxes: (D, 4) xyxy in pixels, finite.
        scores: (D,); of equal scores the earlier box counts as better.
        classes: (D,) int64.
        vote_thresh: IoU at which a box joins a group, itself included, in (0, 1).

    Returns:
        `VoteGroups`.
    """
    # NMS removes IoU > threshold, a group takes IoU >= threshold. In double, where classes can be
    # told apart by their place: each has a stripe of its own, far from the others.
    nms_thresh = float(np.nextafter(vote_thresh, 0.0))
    boxes = boxes.double()
    group = torch.full_like(classes, -1)
    ious = torch.ones_like(boxes[:, 0])
    if not len(boxes):
        return VoteGroups(group, group, ious)
    span = 2.0 ** float((boxes.amax() - boxes.amin() + 1).log2().ceil())
    places = boxes + (classes.double() * span)[:, None] * boxes.new_tensor([1.0, 0.0, 1.0, 0.0])
    order = scores.argsort(descending=True, stable=True)
    left = order[classes[order].argsort(stable=True)]  # by class, then by falling score
    nearby = _spatial_order(boxes, classes)
    heads: List[Tensor] = []
    num_heads = 0
    while len(left):
        counts = torch.unique_consecutive(classes[left], return_counts=True)[1].tolist()
        new = []
        for left_of_class in left.split(counts):
            block = left_of_class[:_BLOCK]
            ranks = torch.arange(len(block), 0, -1, dtype=torch.float64, device=boxes.device)
            new.append(block[nms(boxes[block], ranks, nms_thresh)])
        new_heads = torch.cat(new)
        group[new_heads] = torch.arange(len(new_heads), device=boxes.device) + num_heads
        members = nearby[group[nearby] < 0]
        if len(members):
            first, iou = _first_heads(places[members], places[new_heads], vote_thresh)
            is_joined = first >= 0
            joined = members[is_joined]
            group[joined] = first[is_joined] + num_heads
            ious[joined] = iou[is_joined]
        heads.append(new_heads)
        num_heads += len(new_heads)
        left = left[group[left] < 0]
    return VoteGroups(torch.cat(heads), group, ious)


def vote_boxes(
    candidates: Detections,
    vote_thresh: float = 0.66,
    soft: bool = True,
    soft_score_thresh: float = 0.05,
) -> Detections:
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
        `Detections` by falling score, never more than came in.

    Raises:
        ValueError: for a threshold outside (0, 1).

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 9.0]])
        >>> pile = Detections(boxes, torch.tensor([0.75, 0.25]), torch.tensor([3, 3]))
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
    heads, group, ious = group_boxes(boxes, scores, classes, vote_thresh)
    # Double: a group may have thousands of members, and the sum comes in any order on a GPU.
    weights = scores.double()
    sums = torch.cat((boxes.double() * weights[:, None], weights[:, None]), dim=1)  # (D, 5)
    sums = sums.new_zeros(len(heads), 5).index_add_(0, group, sums)
    sizes = torch.bincount(group, minlength=len(heads))
    has_mean = (sizes > 1) & (sums[:, 4] > 0)
    means = (sums[:, :4] / sums[:, 4:]).to(boxes.dtype)
    voted = Detections(
        torch.where(has_mean[:, None], means, boxes[heads]), scores[heads], classes[heads]
    )
    if soft:
        softened = (weights * (1 - ious)).to(scores.dtype)
        is_head = torch.zeros_like(classes, dtype=torch.bool)
        is_head[heads] = True
        is_back = ~is_head & (softened >= soft_score_thresh)
        back = Detections(boxes[is_back], softened[is_back], classes[is_back])
        voted = Detections(*(torch.cat(parts) for parts in zip(voted, back)))
    order = voted.scores.argsort(descending=True, stable=True)
    return Detections(*(part[order] for part in voted))


def _spatial_order(boxes: Tensor, classes: Tensor) -> Tensor:
    """Order in which boxes of the same class, similar size and close by follow each other."""
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3)
    octaves = sizes.log2().floor()  # (D, 2)
    cells = (box_centers(boxes) - boxes[:, :2].amin()) / torch.exp2(octaves)
    cells = cells.long().clamp(0, 0x3FF)
    code = torch.zeros_like(classes)
    for bit in range(10):  # Morton: bits of x and y in turn
        code |= ((cells[:, 0] >> bit) & 1) << (2 * bit)
        code |= ((cells[:, 1] >> bit) & 1) << (2 * bit + 1)
    octaves = (octaves + 16).long().clamp(0, 63)
    key = ((classes * 64 + octaves[:, 0]) * 64 + octaves[:, 1]) * (1 << 20) + code
    return key.argsort()


def _first_heads(boxes: Tensor, heads: Tensor, thresh: float) -> Tuple[Tensor, Tensor]:
    """First head that each box overlaps by at least `thresh`: (M,) index, -1 for none, and IoU.

    For an IoU of t, width and height may differ by a factor of t at most, and the centres by
    (1 - t) / 2t of the box's width and height. Boxes that follow each other are alike, so each
    chunk of them is compared only with the heads that are near all of it.
    """
    centers, sizes = box_centers(boxes), boxes[:, 2:] - boxes[:, :2]
    # Slack for rounding; a looser bound only costs time.
    reach = sizes * ((1 - thresh) / (2 * thresh) * 1.001) + 1e-2
    lows = torch.cat((centers - reach, sizes * (thresh * 0.999) - 1e-2), dim=1)
    highs = torch.cat((centers + reach, sizes * (1.001 / thresh) + 1e-2), dim=1)
    features = torch.cat((box_centers(heads), heads[:, 2:] - heads[:, :2]), dim=1)  # (H, 4)
    group, ious = [], []
    for chunk, low, high in zip(boxes.split(_CHUNK), lows.split(_CHUNK), highs.split(_CHUNK)):
        is_near = (features >= low.amin(dim=0)) & (features <= high.amax(dim=0))
        near = is_near.all(dim=1).nonzero().squeeze(1)
        if not len(near):
            group.append(torch.full((len(chunk),), -1, device=boxes.device))
            ious.append(torch.zeros_like(chunk[:, 0]))
            continue
        for rows in chunk.split(max(1, _MAX_PAIRS // len(near))):
            pairs = _pairwise_iou(rows, heads[near])
            is_joined = pairs >= thresh
            first = is_joined.to(torch.uint8).argmax(dim=1, keepdim=True)  # the first of equals
            is_any = is_joined.gather(1, first).squeeze(1)
            group.append(torch.where(is_any, near[first.squeeze(1)], -torch.ones_like(near[:1])))
            ious.append(pairs.gather(1, first).squeeze(1))
    return torch.cat(group), torch.cat(ious)


def _pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """(M, H) IoU in the type of the boxes; Detectron2's is float32 only where boxes are."""
    x1, y1, x2, y2 = boxes[:, :, None].unbind(dim=1)  # (M, 1) each
    u1, v1, u2, v2 = others.t()[:, None].unbind(dim=0)  # (1, H) each
    widths = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp_(min=0)
    inter = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp_(min=0).mul_(widths)
    return inter / (box_areas(boxes)[:, None] + box_areas(others) - inter)
