"""Work on all pairs of objects and anchors, within a memory budget.

RetinaNet's, FCOS's and the top-k rule look at objects x anchors. They do so image by image and in
chunks, so that what they hold at once fits a budget, however many objects an image has.
"""

import math
from typing import Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor

from detectron2.structures import Boxes

from ..checks import check_choice, check_integer, check_range
from ..geometry import box_areas
from .assignment import Assignment, assign_all_anchors, concatenate_boxes

# Floats that a dense rule may hold at once, 16 MiB. An image of COCO with 7 objects and 800x1333 px
# needs 0.6 million for IoUs, so chunks are for crowds.
DEFAULT_BUDGET = 2**22


def assign_image_by_image(
    gt_boxes: Sequence[Boxes],
    num_anchors: int,
    device: torch.device,
    match: Callable[[Tensor], Tuple[Tensor, Tensor, Optional[Tensor]]],
    can_ignore: bool = False,
) -> Assignment:
    """Samples of a dense rule, S = N * R, that looks at one image after the other.

    Args:
        gt_boxes: N `Boxes`, one per image.
        num_anchors: R.
        device: where the result lives.
        match: `(m, 4) boxes of an image -> object (R,) int64 in 0..m-1, is_positive (R,) bool,
            is_ignored (R,) bool`; not called for images without objects.
        can_ignore: whether the last of these counts.
    """
    num_objects = [len(boxes) for boxes in gt_boxes]
    size = (len(gt_boxes), num_anchors)
    object_idxs = torch.zeros(size, dtype=torch.int64, device=device)
    is_positive = torch.zeros(size, dtype=torch.bool, device=device)
    is_ignored = torch.zeros_like(is_positive) if can_ignore else None
    first = 0
    for i, boxes in enumerate(concatenate_boxes(gt_boxes, device).split(num_objects)):
        if len(boxes) > 0:
            matches, is_positive[i], ignored = match(boxes)
            object_idxs[i] = matches + first
            if can_ignore:
                is_ignored[i] = ignored
        first += len(boxes)
    return assign_all_anchors(object_idxs, is_positive, num_objects, is_ignored)


def chunk_size(floats_per_item: int, budget: int) -> int:
    """How many items, at least one, are worked on at once, if each holds so many float32 values.

    Example:
        >>> torch.arange(5).split(chunk_size(floats_per_item=10, budget=25))
        (tensor([0, 1]), tensor([2, 3]), tensor([4]))
    """
    return max(budget // max(floats_per_item, 1), 1)


def check_budget(rule: str, budget: int) -> int:
    """Refuse a budget that is not a positive integer; return it."""
    name = "budget (float32 values held at once)"
    return check_integer(rule, name, budget, 1, "model.assigner.budget")


def check_center_in_gt(rule: str, center_in_gt: bool) -> bool:
    """Refuse what is neither True nor False, such as "no"; return it."""
    key = "model.assigner.center_in_gt"
    return check_choice(rule, "center_in_gt", center_in_gt, (True, False), key)


def check_margin(rule: str, center_margin: float) -> float:
    """Refuse a margin in pixels that is no finite number; return it."""
    key = "model.assigner.center_margin"
    return check_range(rule, "center_margin", center_margin, -math.inf, key=key)


def pairwise_ious(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU of all pairs, holding three matrices at most, the result among them.

    The same values as Detectron2's `pairwise_iou`, which holds seven.

    Args:
        boxes: (M, 4) xyxy in pixels.
        anchors: (R, 4) xyxy in pixels.

    Returns:
        (M, R) IoU in [0, 1]; 0 where the boxes do not overlap, also for boxes without area.
    """
    x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(dim=1)  # (M, 1) each
    # Contiguous columns: a third less time, for thousands of objects, than every fourth number.
    left, top, right, bottom = anchors.t().contiguous()  # (R,) each
    ious = torch.minimum(x2, right)
    scratch = torch.maximum(x1, left)  # (M, R)
    ious.sub_(scratch).clamp_(min=0)  # widths of the intersections
    heights = torch.minimum(y2, bottom)
    heights.sub_(torch.maximum(y1, top, out=scratch)).clamp_(min=0)
    ious.mul_(heights)
    del heights
    torch.add(box_areas(boxes).unsqueeze(1), box_areas(anchors), out=scratch)
    scratch.sub_(ious)  # unions
    # Two boxes without area: 0 / 0 must be 0, as in Detectron2.
    return ious.div_(scratch.masked_fill_(ious <= 0, 1))
