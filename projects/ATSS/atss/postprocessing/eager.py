"""Which of the raw predictions are detections?

Per level: threshold the class score, multiply centerness in, keep the best. Then all levels
together: decode, suppress duplicates, keep the best of the image. The work follows the few
locations where some class passes the threshold; the logits themselves are read once.
(`traceable.py` finds the same without branches on values, for graphs.)
"""

import math
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances

from ..head import DensePredictions

__all__ = ["Candidates", "detect", "select_candidates", "suppress"]


class Candidates(NamedTuple):
    """Scored boxes of one image before suppression.

    Attributes:
        boxes: (D, 4) xyxy in pixels of the network's input.
        scores: (D,) in [0, 1].
        classes: (D,) int64 in 0..K-1.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def select_candidates(
    predictions: DensePredictions,
    anchors: Sequence[Boxes],
    image_sizes: Sequence[Tuple[int, int]],
    apply_deltas: Callable[[Tensor, Tensor], Tensor],
    score_thresh: float = 0.05,
    topk: int = 1000,
    sqrt_score: bool = True,
    box_offset: float = 0.0,
) -> List[Candidates]:
    """Best predictions of every level, joined, for each image of a batch.

    Args:
        predictions: raw output of the head, L tensors each.
        anchors: L `Boxes`.
        image_sizes: N (height, width) in pixels, before padding.
        apply_deltas: `(deltas, anchors) -> boxes` of the box transform.
        score_thresh: least class score before centerness, itself excluded.
        topk: how many a level keeps.
        sqrt_score: score is sqrt(class * centerness) instead of the plain product; ranks the same.
        box_offset: pixels added to x and y of every box before clipping, for weights trained in
            another convention of pixel coordinates.

    Returns:
        N `Candidates` by falling score, ties in the order of (level, anchor, class). Boxes are
        clipped to the image; those without area are left out.
    """
    num_images = len(image_sizes)
    num_cell_anchors = predictions.deltas[0].shape[1] // 4
    found = [
        _Found.on_level(predictions, i, level.tensor, num_cell_anchors, score_thresh)
        for i, level in enumerate(anchors)
    ]
    points, scores, classes = zip(*(level.scored(score_thresh, sqrt_score) for level in found))
    images = [level.images[rows] for level, rows in zip(found, points)]

    # Which candidates are among the best of their level and image. How many there are is known
    # after one wait for all levels; mostly there are fewer than `topk`, and nothing is to do.
    counts = torch.stack([i.bincount(minlength=num_images) for i in images]).tolist()  # (L, N)
    kept: List[List[Tensor]] = [[] for _ in range(num_images)]
    first = 0
    all_scores = torch.cat(scores)
    for level_counts in counts:
        for image, count in enumerate(level_counts):
            if count > topk:
                best = all_scores[first : first + count].sort(descending=True, stable=True).indices
                kept[image].append(best[:topk] + first)
            else:
                kept[image].append(torch.arange(first, first + count, device=all_scores.device))
            first += count

    starts = [0]
    for level in found:
        starts.append(starts[-1] + len(level.images))
    points = torch.cat([rows + start for rows, start in zip(points, starts)])
    deltas, point_anchors, point_images = (
        torch.cat(parts)
        for parts in zip(*((level.deltas, level.anchors, level.images) for level in found))
    )
    boxes = apply_deltas(deltas.float(), point_anchors) + box_offset  # (P, 4), all levels at once
    limits = boxes.new_tensor([(w, h, w, h) for h, w in image_sizes])[point_images]
    boxes = torch.minimum(boxes.clamp(min=0), limits)
    # A box wholly outside has no area left: NMS would never remove it, and it would take the place
    # of another among the best. (The authors' clipping leaves it a pixel.)
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    all_classes = torch.cat(classes)
    results = []
    for parts in kept:
        idxs = torch.cat(parts)
        idxs = idxs[has_area[points[idxs]]]
        image_scores, order = all_scores[idxs].sort(descending=True, stable=True)
        idxs = idxs[order]
        results.append(Candidates(boxes[points[idxs]], image_scores, all_classes[idxs]))
    return results


class _Found(NamedTuple):
    """Locations of a level with some class near or above the threshold.

    Attributes:
        images: (P,) int64 image of each, not falling.
        logits: (P, K).
        deltas: (P, 4).
        centerness: (P,) logits, or None.
        anchors: (P, 4) xyxy in pixels.
    """

    images: Tensor
    logits: Tensor
    deltas: Tensor
    centerness: Optional[Tensor]
    anchors: Tensor

    @classmethod
    def on_level(
        cls,
        predictions: DensePredictions,
        index: int,
        anchors: Tensor,
        num_cell_anchors: int,
        score_thresh: float,
    ) -> "_Found":
        def by_anchor(level: Tensor) -> Tensor:  # (N, A, D, Hi * Wi), a view if memory allows
            depth = level.shape[1] // num_cell_anchors
            return level.reshape(len(level), num_cell_anchors, depth, -1)

        logits = by_anchor(predictions.logits[index])
        best = logits.amax(dim=2).transpose(1, 2)  # (N, Hi * Wi, A)
        # Compared as logits, with room for rounding; exactly, as scores, later.
        is_found = best.float() > _logit(score_thresh) - 1e-3
        images, locations, cells = is_found.nonzero().unbind(dim=1)
        centerness = None
        if predictions.centerness is not None:
            centerness = by_anchor(predictions.centerness[index])[images, cells, 0, locations]
        return cls(
            images,
            logits[images, cells, :, locations],
            by_anchor(predictions.deltas[index])[images, cells, :, locations],
            centerness,
            anchors[locations * num_cell_anchors + cells],
        )

    def scored(self, score_thresh: float, sqrt_score: bool) -> Tuple[Tensor, Tensor, Tensor]:
        """Rows, scores and classes of the candidates, (D,) each, by row, then class."""
        class_scores = self.logits.float().sigmoid()  # (P, K)
        # Compare before centerness multiplies in: a low one should re-rank a box, not remove it.
        rows, classes = (class_scores > score_thresh).nonzero().unbind(dim=1)
        scores = class_scores[rows, classes]
        if self.centerness is not None:
            scores = scores * self.centerness.float().sigmoid()[rows]
            if sqrt_score:
                scores = scores.sqrt()
        return rows, scores, classes


def suppress(candidates: Candidates, nms_thresh: float = 0.6, max_detections: int = 100) -> Tensor:
    """Remove boxes that repeat a better one of the same class.

    Args:
        candidates: of one image, all levels joined, in any order.
        nms_thresh: IoU above which the lower score goes.
        max_detections: how many to keep; negative keeps all.

    Returns:
        (D',) int64 indices of the boxes kept, by falling score.
    """
    order = candidates.scores.sort(descending=True, stable=True).indices
    # Whether a box stays depends on better ones only. So the best few are enough, if as many as
    # wanted stay among them; else there are more to look at.
    window = len(order) if max_detections < 0 else min(4 * max_detections, len(order))
    while True:
        best = order[:window]
        keep = batched_nms(*(part[best] for part in candidates), nms_thresh)
        if window == len(order) or len(keep) >= max_detections:
            keep = best[keep]
            return keep[:max_detections] if max_detections >= 0 else keep
        window = min(4 * window, len(order))


def detect(
    predictions: DensePredictions,
    anchors: Sequence[Boxes],
    image_sizes: Sequence[Tuple[int, int]],
    apply_deltas: Callable[[Tensor, Tensor], Tensor],
    score_thresh: float = 0.05,
    topk: int = 1000,
    nms_thresh: float = 0.6,
    max_detections: int = 100,
    sqrt_score: bool = True,
    box_offset: float = 0.0,
) -> List[Instances]:
    """Detections of a batch.

    Args:
        predictions, anchors, image_sizes, apply_deltas, score_thresh, topk, sqrt_score, box_offset:
            see `select_candidates`.
        nms_thresh, max_detections: see `suppress`.

    Returns:
        N `Instances` with `pred_boxes`, `scores` and `pred_classes`, by falling score.
    """
    batch = select_candidates(
        predictions, anchors, image_sizes, apply_deltas, score_thresh, topk, sqrt_score, box_offset
    )
    results = []
    for image_size, candidates in zip(image_sizes, batch):
        keep = suppress(candidates, nms_thresh, max_detections)
        result = Instances(image_size)
        result.pred_boxes = Boxes(candidates.boxes[keep])
        result.scores = candidates.scores[keep]
        result.pred_classes = candidates.classes[keep]
        results.append(result)
    return results


def _logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    return math.log(probability / (1 - probability)) if probability < 1 else math.inf
