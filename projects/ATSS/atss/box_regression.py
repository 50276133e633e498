"""Axis 2 of 4: where regression starts, a box or a point.

RetinaNet refines an anchor box, FCOS measures distances from an anchor point. Both are transforms
with `get_deltas` and `apply_deltas`, and neither the head nor the loss knows which one it has.
"""

import math
from typing import Sequence

import torch
from torch import Tensor

from detectron2.modeling.box_regression import Box2BoxTransform as _Detectron2Box2BoxTransform

from .checks import check_range
from .geometry import box_centers, ltrb_distances

# Pixels: the logarithm of a side is finite. Detectron2 takes boxes as thin as this as empty.
_LEAST_SIDE = 1e-5


class Box2BoxTransform(_Detectron2Box2BoxTransform):
    """Detectron2's transform, except that encoding does not wait for the GPU.

    The parent's `get_deltas` asserts on a value, which waits for all queued work in every training
    step. Formulas and clamping are the parent's.

    Args:
        weights: factors of dx, dy, dw and dh, (10, 10, 5, 5) in the authors' release.
        scale_clamp: most that dw and dh may be when decoded; log(1000 / 16) by default.
    """

    def __init__(
        self,
        weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        scale_clamp: float = math.log(1000.0 / 16),
    ):
        # A plain tuple: a LazyConfig passes its own list type, which is slow to iterate.
        super().__init__(weights=tuple(float(w) for w in weights), scale_clamp=scale_clamp)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Deltas (dx, dy, dw, dh) that turn `src_boxes` into `target_boxes`.

        Args:
            src_boxes: (..., 4) anchors xyxy in pixels, of positive width and height.
            target_boxes: (..., 4) boxes xyxy in pixels; sides below 1e-5 count as 1e-5.

        Returns:
            (..., 4) finite deltas, times the weights.
        """
        src_sizes = src_boxes[..., 2:] - src_boxes[..., :2]
        target_sizes = (target_boxes[..., 2:] - target_boxes[..., :2]).clamp(min=_LEAST_SIDE)
        shifts = (box_centers(target_boxes) - box_centers(src_boxes)) / src_sizes
        dx, dy = shifts.unbind(dim=-1)
        dw, dh = torch.log(target_sizes / src_sizes).unbind(dim=-1)
        wx, wy, ww, wh = self.weights
        return torch.stack((wx * dx, wy * dy, ww * dw, wh * dh), dim=-1)


class PointToBoxTransform:
    """Distances from the anchor's centre to the four sides, in strides (FCOS; Sec. 3.3).

    The stride is the anchor's size divided by `anchor_scale`, so the anchor box only says where the
    point is and which level it belongs to. Predictions pass a ReLU; heads start them at
    `bbox_bias=4`, half the width of an 8-stride anchor.

    Args:
        anchor_scale: anchor size in strides.

    Raises:
        ValueError: if the scale is not positive.

    Example:
        >>> anchor = torch.tensor([[0.0, 0.0, 64.0, 64.0]])  # size 64 at stride 8, centre (32, 32)
        >>> PointToBoxTransform().get_deltas(anchor, torch.tensor([[16.0, 24.0, 40.0, 64.0]]))
        tensor([[2., 1., 1., 4.]])
    """

    def __init__(self, anchor_scale: float = 8.0):
        name = "anchor_scale (size / stride of the anchors)"
        key = "model.box2box_transform.anchor_scale"
        check_range("PointToBoxTransform", name, anchor_scale, 0, key=key, ends="(]")
        self.anchor_scale = float(anchor_scale)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Distances left, top, right, bottom from the anchors' centres, in strides.

        Args:
            src_boxes: (..., 4) anchors xyxy in pixels.
            target_boxes: (..., 4) boxes xyxy in pixels.

        Returns:
            (..., 4) l, t, r, b; negative where the centre is outside the box.
        """
        return ltrb_distances(box_centers(src_boxes), target_boxes) / self._strides(src_boxes)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes at the given distances from the anchors' centres.

        Args:
            deltas: (..., 4) predicted l, t, r, b in strides; negative ones count as 0.
            boxes: (..., 4) anchors xyxy in pixels.

        Returns:
            (..., 4) float32 boxes xyxy in pixels, never inverted.
        """
        boxes = boxes.float()
        distances = deltas.float().relu() * self._strides(boxes)
        centers = box_centers(boxes)
        return torch.cat((centers - distances[..., :2], centers + distances[..., 2:]), dim=-1)

    def _strides(self, boxes: Tensor) -> Tensor:
        sizes = (boxes[..., 2:] - boxes[..., :2]) / self.anchor_scale
        return torch.cat((sizes, sizes), dim=-1)
