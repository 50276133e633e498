"""Formulas of boxes and points that assigners, losses and targets share.

All are elementwise and broadcast, in float32 pixels of Detectron2's continuous coordinates: a box
is (x1, y1, x2, y2), its width x2 - x1.
"""

import torch
from torch import Tensor


def box_centers(boxes: Tensor) -> Tensor:
    """Centre of each box.

    Args:
        boxes: (..., 4) boxes xyxy in pixels.

    Returns:
        (..., 2) centres (x, y) in pixels.
    """
    return (boxes[..., :2] + boxes[..., 2:]) * 0.5


def box_areas(boxes: Tensor) -> Tensor:
    """Area of each box.

    Args:
        boxes: (..., 4) boxes xyxy in pixels.

    Returns:
        (...) areas in square pixels; not clamped, so an inverted box shows.
    """
    widths, heights = (boxes[..., 2:] - boxes[..., :2]).unbind(dim=-1)
    return widths * heights


def ltrb_distances(centers: Tensor, boxes: Tensor) -> Tensor:
    """Signed distances from a point to the left, top, right and bottom side of a box (FCOS, Eq. 1).

    Args:
        centers: (..., 2) points (x, y) in pixels.
        boxes: (..., 4) boxes xyxy in pixels; leading axes broadcast with those of `centers`.

    Returns:
        (..., 4) distances l, t, r, b in pixels, positive on the inner side of each edge.

    Example:
        >>> ltrb_distances(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0, 5.0, 9.0]))
        tensor([2., 3., 2., 5.])
    """
    return torch.cat((centers - boxes[..., :2], boxes[..., 2:] - centers), dim=-1)


def centers_inside(centers: Tensor, boxes: Tensor, margin: float = 0.0) -> Tensor:
    """Whether a point lies inside a box by more than a margin on all four sides (Sec. 3.2, 4.1).

    Args:
        centers: (..., 2) points (x, y) in pixels.
        boxes: (..., 4) boxes xyxy in pixels; leading axes broadcast with those of `centers`.
        margin: least distance to every side in pixels, exclusive.

    Returns:
        (...) bool.
    """
    # By coordinate: reductions and slices over an axis of 2 or 4 are slow for many points.
    x, y = centers.unbind(dim=-1)
    left, top, right, bottom = boxes.unbind(dim=-1)
    horizontal = torch.minimum(x - left, right - x)
    vertical = torch.minimum(y - top, bottom - y)
    return torch.minimum(horizontal, vertical) > margin


def center_distances(centers: Tensor, other_centers: Tensor) -> Tensor:
    """Squared Euclidean distance between points: dx * dx + dy * dy, for ranking by nearness.

    The square root is left out: it is monotonic, and rounding it can merge distances that differ.

    Args:
        centers: (..., 2) points (x, y) in pixels.
        other_centers: (..., 2) points (x, y) in pixels; leading axes broadcast.

    Returns:
        (...) squared distances in square pixels.
    """
    dx, dy = (centers - other_centers).unbind(dim=-1)
    return dx * dx + dy * dy


def elementwise_iou(boxes: Tensor, other_boxes: Tensor) -> Tensor:
    """IoU of broadcast pairs, for when the pairs of interest are few (no M x R matrix).

    Args:
        boxes: (..., 4) boxes xyxy in pixels.
        other_boxes: (..., 4) boxes xyxy in pixels; leading axes broadcast.

    Returns:
        (...) IoU in [0, 1]; 0 where the boxes do not overlap, also for boxes without area.
    """
    left, top, right, bottom = boxes.unbind(dim=-1)
    other_left, other_top, other_right, other_bottom = other_boxes.unbind(dim=-1)
    width = torch.minimum(right, other_right) - torch.maximum(left, other_left)
    height = torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)
    intersection = width.clamp_(min=0) * height.clamp_(min=0)
    areas = (right - left) * (bottom - top)
    other_areas = (other_right - other_left) * (other_bottom - other_top)
    union = areas + other_areas - intersection
    # As in Detectron2's pairwise_iou, 0/0 must be 0: it would poison the mean of its object.
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)
