"""Slow twins: the paper's rules as plain loops, sharing nothing with the fast code.

NumPy, float32 where the contract says so (distances, IoU), float64 elsewhere.
"""

import math
from typing import List, Sequence, Tuple

import numpy as np

Box = Sequence[float]


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(box: Box, other: Box) -> float:
    """IoU of two boxes xyxy, in the arithmetic of their numbers."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    inner = width * height
    return inner / (area(box) + area(other) - inner)


def ltrb(anchor: Box, box: Box) -> Tuple[float, float, float, float]:
    """Distances of the anchor's centre to the sides of a box; negative beyond them."""
    x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
    return x - box[0], y - box[1], box[2] - x, box[3] - y


def atss_assignment(
    levels: Sequence[np.ndarray],
    anchors_per_location: int,
    gt_boxes: np.ndarray,
    topk: int = 9,
    margin: float = 0.01,
    center_in_gt: bool = True,
) -> np.ndarray:
    """Algorithm 1 for one image: for each of the R anchors the index of its object, or -1."""
    anchors = np.concatenate(levels).astype(np.float32)
    owner = np.full(len(anchors), -1)
    best = np.full(len(anchors), -1.0)
    for g, gt in enumerate(gt_boxes.astype(np.float32)):
        gt_x, gt_y = (gt[0] + gt[2]) * np.float32(0.5), (gt[1] + gt[3]) * np.float32(0.5)
        candidates: List[int] = []
        first = 0
        for level in levels:
            # All anchors of a location share its centre: look at the first of each.
            boxes = level[::anchors_per_location].astype(np.float32)
            dx = (boxes[:, 0] + boxes[:, 2]) * np.float32(0.5) - gt_x
            dy = (boxes[:, 1] + boxes[:, 3]) * np.float32(0.5) - gt_y
            distances = dx * dx + dy * dy
            by_distance = sorted(range(len(boxes)), key=lambda i: (distances[i], i))
            for location in by_distance[:topk]:
                start = first + location * anchors_per_location
                candidates.extend(range(start, start + anchors_per_location))
            first += len(level)
        ious = [iou(gt, anchors[i]) for i in candidates]
        mean = sum(float(v) for v in ious) / len(ious)
        std = 0.0
        if len(ious) > 1:
            std = math.sqrt(sum((float(v) - mean) ** 2 for v in ious) / (len(ious) - 1))
        # Stored as float32, as IoUs are: with all IoUs equal they must reach their own mean.
        threshold = np.float32(mean) + np.float32(std)
        for i, value in zip(candidates, ious):
            x = (anchors[i, 0] + anchors[i, 2]) * np.float32(0.5)
            y = (anchors[i, 1] + anchors[i, 3]) * np.float32(0.5)
            inside = min(x - gt[0], y - gt[1], gt[2] - x, gt[3] - y) > np.float32(margin)
            if value >= threshold and (inside or not center_in_gt) and value > best[i]:
                owner[i], best[i] = g, value  # an equal IoU leaves the earlier object
    return owner


def focal_loss(logit: float, is_class: bool, alpha: float = 0.25, gamma: float = 2.0) -> float:
    """Focal loss of one logit (Lin et al., Eq. 5)."""
    p = 1 / (1 + math.exp(-logit))
    if is_class:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p**gamma * math.log(1 - p)


def giou(box: Box, other: Box) -> float:
    """Generalised IoU of two boxes xyxy (Rezatofighi et al., Algorithm 1)."""
    width = max(min(box[2], other[2]) - max(box[0], other[0]), 0)
    height = max(min(box[3], other[3]) - max(box[1], other[1]), 0)
    inner = width * height
    union = area(box) + area(other) - inner
    hull = (max(box[2], other[2]) - min(box[0], other[0])) * (
        max(box[3], other[3]) - min(box[1], other[1])
    )
    return inner / union - (hull - union) / hull


def centerness(anchor: Box, box: Box) -> float:
    """FCOS, Eq. 3, with distances clamped at 0."""
    left, top, right, bottom = (max(distance, 0) for distance in ltrb(anchor, box))
    if max(left, right) == 0 or max(top, bottom) == 0:
        return 0.0
    return math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))


def binary_cross_entropy(logit: float, target: float) -> float:
    """-target * log(p) - (1 - target) * log(1 - p)."""
    p = 1 / (1 + math.exp(-logit))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def nms(boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, threshold: float) -> List[int]:
    """Greedy suppression per class; indices by falling score."""
    kept: List[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(classes[i] != classes[j] or iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def detections(
    levels: Sequence[Tuple[np.ndarray, np.ndarray, np.ndarray]],
    score_thresh: float = 0.05,
    topk: int = 1000,
    nms_thresh: float = 0.6,
    max_detections: int = 100,
) -> List[Tuple[np.ndarray, float, int]]:
    """Post-processing of one image.

    Args:
        levels: per level class probabilities (R, K), centerness probabilities (R,) and decoded
            boxes (R, 4).
    """
    boxes, scores, classes = [], [], []
    for class_scores, center_scores, level_boxes in levels:
        found = []
        for r in range(class_scores.shape[0]):
            for k in range(class_scores.shape[1]):
                if class_scores[r, k] > score_thresh:
                    found.append((math.sqrt(class_scores[r, k] * center_scores[r]), r, k))
        found.sort(key=lambda entry: -entry[0])
        for score, r, k in found[:topk]:
            boxes.append(level_boxes[r])
            scores.append(score)
            classes.append(k)
    if not boxes:
        return []
    kept = nms(np.stack(boxes), np.array(scores), np.array(classes), nms_thresh)
    return [(boxes[i], scores[i], classes[i]) for i in kept[:max_detections]]
