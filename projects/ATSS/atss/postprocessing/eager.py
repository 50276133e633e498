"""Selection of detections by fast code, with branches on sizes and values.

Per level: threshold the class score, multiply the quality in, keep the best. Then all levels
together: decode, suppress duplicates, keep the best of the image. The work follows the few
locations where some class passes the threshold; the logits themselves are read once.
(`traceable.py` finds the same without branches on values, for graphs.)
"""

import math
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from detectron2.layers import batched_nms

from .selection import Detections, DetectionSettings, SelectionInputs


def select_candidates(inputs: SelectionInputs, settings: DetectionSettings) -> List[Detections]:
    """Best predictions of every level, joined, for each image of a batch.

    Returns:
        N `Detections` by falling score, ties in the order of (level, anchor, class). Boxes are
        clipped to the image; those without area are left out.
    """
    predictions, anchors, image_sizes, decode = inputs
    topk, num_images = settings.topk_candidates, len(image_sizes)
    predictions.check(predictions.num_classes)
    found = [
        _Found.on_level(inputs, i, level.tensor, settings.score_thresh)
        for i, level in enumerate(anchors)
    ]
    points, scores, classes = zip(*(level.scored(settings) for level in found))
    images = [level.images[rows] for level, rows in zip(found, points)]

    # Which candidates are among the best of their level and image. One transfer brings all counts
    # to the host; a level with at most `topk` candidates skips the sort.
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
    boxes = decode(deltas.float(), point_anchors)  # (P, 4), all levels at once
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
        results.append(Detections(boxes[points[idxs]], image_scores, all_classes[idxs]))
    return results


class _Found(NamedTuple):
    """Locations of a level with some class near or above the threshold.

    Attributes:
        images: (P,) int64 image of each, not falling.
        logits: (P, K).
        deltas: (P, 4).
        quality: (P,) logits, or None.
        anchors: (P, 4) xyxy in pixels.
    """

    images: Tensor
    logits: Tensor
    deltas: Tensor
    quality: Optional[Tensor]
    anchors: Tensor

    @classmethod
    def on_level(
        cls, inputs: SelectionInputs, index: int, anchors: Tensor, score_thresh: float
    ) -> "_Found":
        predictions = inputs.predictions
        num_anchors = predictions.num_anchors

        def by_anchor(level: Tensor) -> Tensor:  # (N, A, V, Hi * Wi), a view if memory allows
            num_values = level.shape[1] // num_anchors
            return level.reshape(len(level), num_anchors, num_values, -1)

        logits = by_anchor(predictions.logits[index])
        best = logits.amax(dim=2).transpose(1, 2)  # (N, Hi * Wi, A)
        # Compared as logits, with room for rounding; exactly, as scores, later.
        is_found = best.float() > logit(score_thresh) - 1e-3
        images, locations, cells = is_found.nonzero().unbind(dim=1)
        quality = None
        if predictions.quality is not None:
            quality = by_anchor(predictions.quality[index])[images, cells, 0, locations]
        return cls(
            images,
            logits[images, cells, :, locations],
            by_anchor(predictions.deltas[index])[images, cells, :, locations],
            quality,
            anchors[locations * num_anchors + cells],
        )

    def scored(self, settings: DetectionSettings) -> Tuple[Tensor, Tensor, Tensor]:
        """Rows, scores and classes of the candidates, (D,) each, by row, then class."""
        class_scores = self.logits.float().sigmoid()  # (P, K)
        # Compare before quality multiplies in: a low one should re-rank a box, not remove it.
        rows, classes = (class_scores > settings.score_thresh).nonzero().unbind(dim=1)
        scores = class_scores[rows, classes]
        if self.quality is not None:
            scores = scores * self.quality.float().sigmoid()[rows]
            if settings.sqrt_score:
                scores = scores.sqrt()
        return rows, scores, classes


def suppress(
    candidates: Detections, nms_thresh: float = 0.6, max_detections: int = 100
) -> Detections:
    """What is left without boxes that repeat a better one of the same class.

    Args:
        candidates: of one image, all levels joined, in any order.
        nms_thresh: IoU above which the box of lower score is removed.
        max_detections: how many to keep; negative keeps all.

    Returns:
        `Detections` by falling score.
    """
    candidates = candidates.at(candidates.scores.sort(descending=True, stable=True).indices)
    # Whether a box stays depends on better ones only. So the best few are enough, if as many as
    # wanted stay among them; else there are more to look at.
    num_all = len(candidates.scores)
    window = num_all if max_detections < 0 else min(4 * max_detections, num_all)
    while True:
        keep = batched_nms(*candidates.at(slice(window)), nms_thresh)
        if window == num_all or len(keep) >= max_detections:
            return candidates.at(keep[:max_detections] if max_detections >= 0 else keep)
        window = min(4 * window, num_all)


def logit(probability: float) -> float:
    """log(p / (1 - p)), infinite at 0 and 1 and beyond."""
    if probability <= 0:
        return -math.inf
    return math.log(probability / (1 - probability)) if probability < 1 else math.inf
