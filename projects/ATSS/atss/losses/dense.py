"""Axis 3 of 4: the loss of a dense detector, three terms and what they are divided by."""

from typing import Dict, Optional, Union

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from detectron2.utils import comm

from ..anchor_grid import AnchorGrid
from ..assigners import Assignment
from ..box_regression import Box2BoxTransform, PointToBoxTransform
from ..checks import check_choice, check_integer, check_range
from ..geometry import elementwise_iou
from ..predictions import DensePredictions, Places, read_maps
from ..targets import Targets, centerness_targets
from .boxes import elementwise_giou_loss, elementwise_smooth_l1_loss
from .classification import ClassLoss, FocalLoss


class DenseLoss:
    """Loss of a dense detector on one batch (Sec. 3.1; weights of the authors' release).

    A class loss over all anchors, a box loss over positives, and binary cross-entropy for the
    quality that the head predicts of them. Everything is float32; boxes and quality are read at the
    samples only. No size depends on values, so a training step never waits for the GPU.
    `class_targets` and `box_weights` of an assignment win over what this loss would take.

    Args:
        box2box_transform: axis 2, what the deltas mean.
        num_classes: K.
        classification: class loss; `FocalLoss()` by default.
        box_loss: "giou" on decoded boxes, or "smooth_l1" on deltas.
        box_loss_weight: factor of the box loss: 2.0 with GIoU; 0.25 gives RetinaNet's division of
            smooth L1 by four times the positives.
        quality: what the quality branch of the head learns: "centerness", or "iou" (of the
            predicted box). Without effect for a head that has no such branch; None refuses one.
        box_weighting: weight of a positive in the box loss: "quality", its quality target (1 for a
            head without the branch: our reading, the paper does not say); "score", its highest
            class probability (GFL); "iou", that of its predicted box; None, 1. Weighted losses are
            divided by the sum of the weights over workers, others by the number of positives.
        class_normalizer: the class loss is divided by the number of "positives", or by the sum of
            their "targets".
        smooth_l1_beta: where smooth L1 turns from quadratic to linear.

    Raises:
        ValueError: for an unknown name or numbers out of range.
    """

    def __init__(
        self,
        box2box_transform: Union[Box2BoxTransform, PointToBoxTransform],
        num_classes: int,
        classification: Optional[ClassLoss] = None,
        box_loss: str = "giou",
        box_loss_weight: float = 2.0,
        quality: Optional[str] = "centerness",
        box_weighting: Optional[str] = "quality",
        class_normalizer: str = "positives",
        smooth_l1_beta: float = 0.11,
    ):
        for name, value, choices in (
            ("box_loss", box_loss, ("giou", "smooth_l1")),
            ("quality", quality, ("centerness", "iou", None)),
            ("box_weighting", box_weighting, ("quality", "score", "iou", None)),
            ("class_normalizer", class_normalizer, ("positives", "targets")),
        ):
            check_choice("DenseLoss", name, value, choices, f"model.loss.{name}")
        check_integer("DenseLoss", "num_classes", num_classes, 1, "model.num_classes")
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        self.classification = FocalLoss() if classification is None else classification
        self.box_loss = box_loss
        self.box_loss_weight = box_loss_weight
        self.quality = quality
        self.box_weighting = box_weighting
        self.class_normalizer = class_normalizer
        self.smooth_l1_beta = smooth_l1_beta
        for name in ("box_loss_weight", "smooth_l1_beta"):
            check_range("DenseLoss", name, getattr(self, name), 0, key=f"model.loss.{name}")

    def __call__(
        self, predictions: DensePredictions, anchors: AnchorGrid, targets: Targets
    ) -> Dict[str, Tensor]:
        """Losses of a batch, normalised over all workers.

        Args:
            predictions: raw output of the head, L tensors each.
            anchors: the grid of the padded images.
            targets: what its samples should say.

        Returns:
            0-dim float32 tensors "loss_cls", "loss_box_reg" and, with a quality branch,
            "loss_centerness" or "loss_iou".

        Raises:
            ValueError: for maps whose channels are not those that anchors and classes ask for, or
                a quality branch that nothing would train.
        """
        predictions.check(self.num_classes, anchors)
        has_quality = predictions.quality is not None
        if has_quality and self.quality is None:
            raise ValueError(
                "DenseLoss has quality=None, but the head has a quality branch, which nothing "
                "would train. Set model.loss.quality (MODEL.ATSS.LOSS.QUALITY) to 'centerness' or "
                "'iou', or take a head without."
            )
        assignment = targets.assignment
        is_positive = assignment.is_positive  # (S,)
        if assignment.is_ignored is not None:
            ignored = assignment.is_ignored[assignment.image_idxs, assignment.anchor_idxs]
            is_positive = is_positive & ~ignored
        places = Places.of(anchors, assignment.image_idxs, assignment.anchor_idxs)
        anchor_boxes = anchors.boxes_of(places.lattice)  # (S, 4)
        # Boxes of other samples must not reach log or division: their gradient could be NaN in
        # spite of the mask.
        gt_boxes = torch.where(is_positive.unsqueeze(1), targets.boxes, anchor_boxes)
        deltas = read_maps(predictions.deltas, places, predictions.num_anchors).float()  # (S, 4)
        boxes = self.box2box_transform.apply_deltas(deltas, anchor_boxes)

        ious = None
        if self._uses_ious(assignment):
            ious = elementwise_iou(boxes.detach(), gt_boxes)
        quality = None  # (S,)
        if has_quality:
            is_iou = self.quality == "iou"
            quality = ious if is_iou else centerness_targets(anchor_boxes, gt_boxes)
        class_targets = assignment.class_targets
        if class_targets is None:
            is_soft = self.classification.uses_ious
            class_targets = ious if is_soft else torch.ones_like(gt_boxes[:, 0])
        box_weights = assignment.box_weights
        if box_weights is None:
            box_weights = self._box_weights(predictions, places, quality, ious)
        # Both are undefined where a sample is not positive, NaN included.
        class_targets = torch.where(is_positive, class_targets, 0.0)
        if box_weights is not None:
            box_weights = torch.where(is_positive, box_weights, 0.0)

        weights = is_positive if box_weights is None else box_weights
        sums = (is_positive, weights, class_targets)
        num_positives, weight_sum, target_sum = reduce_mean(
            torch.stack([values.sum().float() for values in sums])
        ).unbind()
        num_positives = num_positives.clamp(min=1)
        least = torch.finfo(torch.float32).eps
        weight_sum = num_positives if box_weights is None else weight_sum.clamp(min=least)
        class_sum = target_sum.clamp(min=1) if self.class_normalizer == "targets" else num_positives

        class_loss = self.classification(
            predictions.logits,
            places,
            targets.classes,
            class_targets,
            is_positive,
            predictions.num_anchors,
            assignment.is_ignored,
        )
        if self.box_loss == "giou":
            box_losses = elementwise_giou_loss(boxes, gt_boxes)  # (S,)
        else:
            box_losses = elementwise_smooth_l1_loss(
                deltas, anchor_boxes, gt_boxes, self.box2box_transform, self.smooth_l1_beta
            )
        losses = {
            "loss_cls": class_loss / class_sum,
            "loss_box_reg": (box_losses * weights).sum() / weight_sum * self.box_loss_weight,
        }
        if has_quality:
            logits = read_maps(predictions.quality, places, predictions.num_anchors)
            logits = logits.squeeze(1).float()
            bce = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
            losses[f"loss_{self.quality}"] = (bce * is_positive).sum() / num_positives
        return losses

    def _uses_ious(self, assignment: Assignment) -> bool:
        is_soft = self.classification.uses_ious and assignment.class_targets is None
        return is_soft or "iou" in (self.quality, self.box_weighting)

    def _box_weights(
        self,
        predictions: DensePredictions,
        places: Places,
        quality: Optional[Tensor],
        ious: Optional[Tensor],
    ) -> Optional[Tensor]:
        """Weights of the box losses, (S,) without gradient, or None for 1."""
        if self.box_weighting == "score":
            logits = [level.detach() for level in predictions.logits]
            if len(places.image_idxs) >= sum(level[:, 0].numel() for level in logits):
                # So many samples: the best of all locations takes less memory than all classes.
                shape = (predictions.num_anchors, self.num_classes)
                logits = [level.unflatten(1, shape).amax(dim=2) for level in logits]
            logits = read_maps(logits, places, predictions.num_anchors)  # (S, K) or (S, 1)
            return logits.amax(dim=1).float().sigmoid()
        return {"quality": quality, "iou": ious, None: None}[self.box_weighting]


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
