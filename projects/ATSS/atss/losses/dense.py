"""How wrong are the predictions?

Focal loss for the class of every anchor, a box loss for positives, binary cross-entropy for their
centerness. Targets are made before and the box transform is passed in, so this file knows neither
how positives were chosen nor where regression starts. Everything is computed in float32 with masks:
no size depends on values, so a training step never waits for the GPU.
"""

from typing import Dict, Sequence, Tuple, Union

import torch
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from detectron2.structures import Boxes
from detectron2.utils import comm

from ..anchors import AnchorGrid, concatenate_anchors
from ..box_regression import Box2BoxTransform, PointToBoxTransform
from ..geometry import box_areas
from ..head import DensePredictions
from ..slots import locate, take
from ..targets import Targets, centerness_targets
from .classification import focal_loss_sum

__all__ = ["DenseLoss", "elementwise_giou_loss", "reduce_mean"]

_BOX_LOSSES = ("giou", "smooth_l1")


class DenseLoss:
    """Loss of a dense detector on one batch (Sec. 3.1; weights of the authors' release).

    Args:
        box2box_transform: axis 2, what the deltas mean.
        num_classes: K.
        box_loss: "giou" on decoded boxes, or "smooth_l1" on deltas.
        box_loss_weight: factor of the box loss: 2.0 with GIoU; 0.25 gives RetinaNet's division of
            smooth L1 by four times the positives.
        centerness: whether the head predicts centerness. If so, the box loss of a positive is
            weighted by its centerness target and normalised by their sum; else positives count
            alike (our reading, the paper does not say).
        focal_alpha: weight of positives against negatives in the focal loss, in [0, 1].
        focal_gamma: its focusing exponent, >= 0.
        smooth_l1_beta: where smooth L1 turns from quadratic to linear.

    Raises:
        ValueError: for an unknown box loss or numbers out of range.
    """

    def __init__(
        self,
        box2box_transform: Union[Box2BoxTransform, PointToBoxTransform],
        num_classes: int,
        box_loss: str = "giou",
        box_loss_weight: float = 2.0,
        centerness: bool = True,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        smooth_l1_beta: float = 0.11,
    ):
        if box_loss not in _BOX_LOSSES:
            raise ValueError(
                f"Unknown box loss {box_loss!r} for model.loss.box_loss; known are "
                f"{list(_BOX_LOSSES)}."
            )
        for name, value, low, high in (
            ("num_classes", num_classes, 1, float("inf")),
            ("box_loss_weight", box_loss_weight, 0, float("inf")),
            ("focal_alpha", focal_alpha, 0, 1),
            ("focal_gamma", focal_gamma, 0, float("inf")),
            ("smooth_l1_beta", smooth_l1_beta, 0, float("inf")),
        ):
            if not low <= value <= high:
                raise ValueError(f"DenseLoss needs {name} in [{low}, {high}], got {value}.")
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        self.box_loss = box_loss
        self.box_loss_weight = box_loss_weight
        self.centerness = centerness
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.smooth_l1_beta = smooth_l1_beta

    def __call__(
        self,
        predictions: DensePredictions,
        anchors: Union[AnchorGrid, Sequence[Boxes]],
        targets: Targets,
    ) -> Dict[str, Tensor]:
        """Losses of a batch, normalised over all workers.

        Args:
            predictions: raw output of the head, L tensors each.
            anchors: the R anchors of the padded images.
            targets: what they should have been, (N, R).

        Returns:
            0-dim float32 tensors "loss_cls", "loss_box_reg" and, with centerness,
            "loss_centerness".
        """
        num_cell_anchors = predictions.deltas[0].shape[1] // 4
        grid_sizes = [tuple(level.shape[-2:]) for level in predictions.deltas]
        images, anchor_idxs, is_positive = _positive_slots(targets, self.num_classes)  # (S,) each
        slots = locate(images, anchor_idxs, grid_sizes, num_cell_anchors)

        anchor_boxes = concatenate_anchors(anchors)[anchor_idxs]  # (S, 4)
        # Undefined boxes must not reach log or division: their gradient could be NaN in spite of
        # the mask.
        gt_boxes = targets.boxes[images, anchor_idxs]
        gt_boxes = torch.where(is_positive.unsqueeze(1), gt_boxes, anchor_boxes)

        num_positives = is_positive.sum().float()
        centerness = centerness_targets(anchor_boxes, gt_boxes) * is_positive  # (S,)
        num_positives, centerness_sum = reduce_mean(
            torch.stack((num_positives, centerness.sum()))
        ).unbind()
        num_positives = num_positives.clamp(min=1)
        centerness_sum = centerness_sum.clamp(min=torch.finfo(torch.float32).eps)

        deltas = take(predictions.deltas, slots, num_cell_anchors).float()  # (S, 4)
        box_losses = self._box_losses(deltas, anchor_boxes, gt_boxes)  # (S,)
        if self.centerness:
            box_loss = (box_losses * centerness).sum() / centerness_sum
        else:
            box_loss = (box_losses * is_positive).sum() / num_positives
        class_loss = focal_loss_sum(
            predictions.logits,
            slots,
            targets.labels[images, anchor_idxs],
            is_positive,
            num_cell_anchors,
            # Sparse rules have no ignored anchors.
            None if targets.claims is not None else targets.labels < 0,
            self.focal_alpha,
            self.focal_gamma,
        )
        losses = {
            "loss_cls": class_loss / num_positives,
            "loss_box_reg": box_loss * self.box_loss_weight,
        }
        if self.centerness:
            assert predictions.centerness is not None, "the head predicts no centerness"
            logits = (
                take(predictions.centerness, slots, num_cell_anchors).squeeze(1).float()
            )  # (S,)
            bce = F.binary_cross_entropy_with_logits(logits, centerness, reduction="none")
            losses["loss_centerness"] = (bce * is_positive).sum() / num_positives
        return losses

    def _box_losses(self, deltas: Tensor, anchors: Tensor, gt_boxes: Tensor) -> Tensor:
        """Box loss of each slot, (S,)."""
        if self.box_loss == "giou":
            boxes = self.box2box_transform.apply_deltas(deltas, anchors)
            return elementwise_giou_loss(boxes, gt_boxes)
        gt_deltas = self.box2box_transform.get_deltas(anchors, gt_boxes)
        return smooth_l1_loss(deltas, gt_deltas, self.smooth_l1_beta).sum(dim=-1)


def elementwise_giou_loss(boxes: Tensor, gt_boxes: Tensor, eps: float = 1e-7) -> Tensor:
    """1 - GIoU of each pair (Rezatofighi et al., 2019), in float32.

    fvcore's and torchvision's versions either wait for the GPU on a check of their input or fail
    under bfloat16 autocast.

    Args:
        boxes: (S, 4) predicted boxes xyxy in pixels.
        gt_boxes: (S, 4) boxes xyxy in pixels.
        eps: added to areas in denominators.

    Returns:
        (S,) losses in [0, 2].
    """
    boxes, gt_boxes = boxes.float(), gt_boxes.float()
    inner = torch.minimum(boxes[:, 2:], gt_boxes[:, 2:]) - torch.maximum(
        boxes[:, :2], gt_boxes[:, :2]
    )
    outer = torch.maximum(boxes[:, 2:], gt_boxes[:, 2:]) - torch.minimum(
        boxes[:, :2], gt_boxes[:, :2]
    )
    inner = inner.clamp(min=0)
    intersection = inner[:, 0] * inner[:, 1]
    union = box_areas(boxes) + box_areas(gt_boxes) - intersection + eps
    hull = outer[:, 0] * outer[:, 1] + eps
    return 1 - intersection / union + (hull - union) / hull


def reduce_mean(values: Tensor) -> Tensor:
    """Mean over all workers; every worker must call it, whatever it holds.

    Args:
        values: any shape, the same on all workers.

    Returns:
        The mean, on every worker; `values` itself where there is one.
    """
    num_workers = comm.get_world_size()
    if num_workers == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / num_workers


def _positive_slots(targets: Targets, num_classes: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Where positives can be, and where they are.

    The candidates of all objects where the assigner names them (tens per object), else all anchors.

    Returns:
        (S,) int64 images, (S,) int64 anchors of the image and (S,) bool, true exactly once for
        every positive of the batch.
    """
    labels = targets.labels
    claims = targets.claims
    if claims is None:
        images, anchor_idxs = (
            torch.arange(size, device=labels.device).view(shape).expand(labels.shape)
            for size, shape in zip(labels.shape, ((-1, 1), (1, -1)))
        )
        is_positive = (labels >= 0) & (labels < num_classes)
        return images.reshape(-1), anchor_idxs.reshape(-1), is_positive.view(-1)
    images = claims.image_idxs.unsqueeze(1).expand_as(claims.anchor_idxs)
    return images.reshape(-1), claims.anchor_idxs.reshape(-1), claims.is_won.view(-1)
