"""Work on all pairs of objects and anchors, within a memory budget.

RetinaNet's, FCOS's and the top-k rule look at objects x anchors. They do so image by image and in
chunks, so that what they hold at once fits a budget, however many objects an image has.
"""

from typing import Iterator, Tuple

import torch
from torch import Tensor

from ..checks import check_integer
from ..geometry import box_areas

# Floats that a dense rule may hold at once, 16 MiB. An image of COCO with 7 objects and 800x1333 px
# needs 0.6 million for IoUs, so chunks are for crowds.
DEFAULT_BUDGET = 2**22


def chunks(total: int, floats_per_item: int, budget: int) -> Iterator[Tuple[int, int]]:
    """Ranges that cover 0..total, each within the budget (but of at least one item).

    Args:
        total: number of items.
        floats_per_item: float32 values that the work on one item holds at once.
        budget: float32 values that may be held at once.

    Returns:
        Pairs (first, last), `last` excluded.

    Example:
        >>> list(chunks(5, floats_per_item=10, budget=25))
        [(0, 2), (2, 4), (4, 5)]
    """
    size = max(budget // max(floats_per_item, 1), 1)
    for first in range(0, total, size):
        yield first, min(first + size, total)


def check_budget(rule: str, budget: int) -> int:
    """Refuse a budget that is not a positive integer; return it."""
    name = "budget (float32 values held at once)"
    return check_integer(rule, name, budget, 1, "model.assigner.budget")


def pairwise_ious(boxes: Tensor, anchors: Tensor, out: Tensor) -> Tensor:
    """IoU of all pairs, holding three matrices at most, the result among them.

    The same values as Detectron2's `pairwise_iou`, which holds seven.

    Args:
        boxes: (M, 4) xyxy in pixels.
        anchors: (R, 4) xyxy in pixels.
        out: (M, R) float32 to write to.

    Returns:
        `out`, IoU in [0, 1]; 0 where the boxes do not overlap, also for boxes without area.
    """
    x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(dim=1)  # (M, 1) each
    # Contiguous columns: a third less time, for thousands of objects, than every fourth number.
    left, top, right, bottom = anchors.t().contiguous()  # (R,) each
    torch.minimum(x2, right, out=out)
    scratch = torch.maximum(x1, left)  # (M, R)
    out.sub_(scratch).clamp_(min=0)  # widths of the intersections
    heights = torch.minimum(y2, bottom)
    heights.sub_(torch.maximum(y1, top, out=scratch)).clamp_(min=0)
    out.mul_(heights)
    del heights
    torch.add(box_areas(boxes).unsqueeze(1), box_areas(anchors), out=scratch)
    scratch.sub_(out)  # unions
    # Two boxes without area: 0 / 0 must be 0, as in Detectron2.
    return out.div_(scratch.masked_fill_(out <= 0, 1))
