"""SimOTA and the losses of a dense detector as plain loops, written from the papers.

Nothing here comes from `atss.assigners` or `atss.losses`. Everything is float64 but the geometry of
candidates, which is float32 as in any implementation.
"""

import math
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from reference import binary_cross_entropy, centerness, focal_loss, giou, iou, ltrb
from reference_assigners import Box, Layout


class SimOTAResult(NamedTuple):
    """Assignment of a batch, image by image.

    Attributes:
        objects: the object of each anchor, or -1.
        targets: the soft label of each anchor, 0 without object.
        gap: the least difference, other than 0, that any decision hung on.
    """

    objects: List[List[int]]
    targets: List[List[float]]
    gap: float


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def simota_rule(
    layout: Layout,
    classes: Sequence[Sequence[int]],
    boxes: np.ndarray,
    logits: np.ndarray,
    quality: Optional[np.ndarray],
    radius: float = 1.5,
    topk: int = 10,
    iou_weight: float = 3.0,
    restricted: bool = True,
) -> SimOTAResult:
    """YOLOX, Sec. 2.1, and the official code where `restricted` is False.

    There, all objects of an image share one list of candidates: every object may count those of
    others and take them at a cost of 1e6 more, and an anchor taken twice goes to the cheapest of
    all objects, whether that one took it or not.

    Args:
        layout: anchors and objects.
        classes: of the objects of each image.
        boxes: (N, R, 4) predicted boxes xyxy in pixels.
        logits: (N, R, K) class logits.
        quality: (N, R) logits, or None.
        radius, topk, iou_weight: settings of the rule.
        restricted: whether an object sees only its own candidates.
    """
    anchors = layout.anchors()
    result = SimOTAResult([], [], math.inf)
    gaps = []
    for image, objects in enumerate(layout.images):
        own = [near_anchors(anchors, box, radius) for box in objects]
        union = sorted(set().union(*own))
        cost, ious, taken = {}, {}, {}
        for g, box in enumerate(objects):
            seen = own[g] if restricted else union
            for r in seen:
                q = 1.0 if quality is None else sigmoid(quality[image, r])
                scores = [math.sqrt(sigmoid(x) * q) for x in logits[image, r]]
                scores = [p if k == classes[image][g] else 1 - p for k, p in enumerate(scores)]
                ious[g, r] = iou(box, boxes[image, r])
                cost[g, r] = -sum(map(math.log, scores)) - iou_weight * math.log(ious[g, r] + 1e-8)
                cost[g, r] += 0 if r in own[g] else 1e6
            total = sum(sorted((ious[g, r] for r in seen), reverse=True)[:topk])
            count = max(int(total), 1)
            gaps += [abs(total - round(total))] if round(total) > 1 else []
            order = sorted((cost[g, r], r) for r in seen)
            gaps += [order[count][0] - order[count - 1][0]] if len(order) > count else []
            for _, r in order[:count]:
                taken.setdefault(r, []).append(g)
        owners, targets = [-1] * len(anchors), [0.0] * len(anchors)
        for r, takers in taken.items():
            rivals = takers if restricted or len(takers) == 1 else range(len(objects))
            ranked = sorted((cost[g, r], g) for g in rivals)
            gaps += [ranked[1][0] - ranked[0][0]] if len(ranked) > 1 else []
            owners[r], targets[r] = ranked[0][1], ious[ranked[0][1], r]
        result.objects.append(owners)
        result.targets.append(targets)
    return result._replace(gap=min((gap for gap in gaps if gap > 0), default=math.inf))


def near_anchors(anchors: Sequence, box: Box, radius: float) -> List[int]:
    """Anchors whose centre is closer than `radius` strides to that of the box on both axes."""
    found = []
    for r, (anchor, stride, _) in enumerate(anchors):
        left, top, right, bottom = ltrb(anchor, box)
        distance = max(abs(left - right), abs(top - bottom)) / 2
        if distance < np.float32(radius) * np.float32(stride):
            found.append(r)
    return found


def soft_class_loss(
    logits: torch.Tensor, targets: torch.Tensor, gamma: float, alpha: Optional[float] = None
) -> torch.Tensor:
    """Class loss of every logit, for autograd: quality focal loss (GFL, Eq. 2) without `alpha`.

    With it focal loss (Lin et al., Eq. 5), mixed linearly between the cases y = 0 and y = 1.
    """
    p = logits.sigmoid()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if alpha is None:
        return (targets - p).abs() ** gamma * bce
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * (targets * (1 - p) + (1 - targets) * p) ** gamma * bce


def dense_losses(
    anchors: np.ndarray,
    boxes: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    gt_boxes: np.ndarray,
    class_loss: str,
    quality_logits: Optional[np.ndarray] = None,
    quality: Optional[str] = None,
    box_weighting: Optional[str] = None,
    class_normalizer: str = "positives",
) -> Dict[str, float]:
    """Losses of a batch with GIoU, from dense arrays.

    Args:
        anchors: (R, 4) boxes xyxy in pixels.
        boxes: (N, R, 4) predicted boxes.
        logits: (N, R, K) class logits.
        labels: (N, R) class, K for background.
        gt_boxes: (N, R, 4) box that each positive learns.
        class_loss: "focal" with hard targets, or "quality" with the IoU as target and beta 2.
        quality_logits: (N, R) for a head that has them.
        quality, box_weighting, class_normalizer: settings of `DenseLoss`.
    """
    num_classes = logits.shape[2]
    cls = box = branch = weight_sum = target_sum = 0.0
    num_positives = 0
    for image, r in np.ndindex(*labels.shape):
        label, predicted, truth = labels[image, r], boxes[image, r], gt_boxes[image, r]
        is_positive = label < num_classes
        target = iou(predicted, truth) if class_loss == "quality" and is_positive else 1.0
        for k, x in enumerate(logits[image, r]):
            if class_loss == "focal":
                cls += focal_loss(x, k == label)
            else:
                y = target if k == label else 0.0
                cls += abs(y - sigmoid(x)) ** 2 * binary_cross_entropy(x, y)
        if not is_positive:
            continue
        num_positives += 1
        target_sum += target
        weight = 1.0
        if quality_logits is not None:
            is_iou = quality == "iou"
            fit = iou(predicted, truth) if is_iou else centerness(anchors[r], truth)
            branch += binary_cross_entropy(quality_logits[image, r], fit)
            weight = fit if box_weighting == "quality" else 1.0
        if box_weighting == "score":
            weight = sigmoid(max(logits[image, r]))
        elif box_weighting == "iou":
            weight = iou(predicted, truth)
        weight_sum += weight
        box += weight * (1 - giou(predicted, truth))
    divisor = target_sum if class_normalizer == "targets" else num_positives
    losses = {"loss_cls": cls / max(divisor, 1), "loss_box_reg": 2 * box / weight_sum}
    if quality_logits is not None:
        losses[f"loss_{quality}"] = branch / num_positives
    return losses
