"""Which of the raw predictions are detections?

Per level: threshold the class score, multiply centerness in, keep the best, decode only those. Then
all levels together: suppress duplicates, keep the best of the image.
"""

from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances

from .head import DensePredictions, flatten_level

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
    logits: Tensor,
    deltas: Tensor,
    centerness: Optional[Tensor],
    anchors: Tensor,
    apply_deltas: Callable[[Tensor, Tensor], Tensor],
    score_thresh: float = 0.05,
    topk: int = 1000,
    sqrt_score: bool = True,
) -> Candidates:
    """Best predictions of one level of one image.

    Args:
        logits: (Ri, K) class logits.
        deltas: (Ri, 4).
        centerness: (Ri,) centerness logits or None.
        anchors: (Ri, 4) xyxy in pixels.
        apply_deltas: `(deltas, anchors) -> boxes` of the box transform.
        score_thresh: least class score, itself excluded.
        topk: how many to keep.
        sqrt_score: score is sqrt(class * centerness) instead of the plain product; ranks the same.

    Returns:
        `Candidates` by falling score, ties in the order of (anchor, class).
    """
    num_classes = logits.shape[1]
    scores = logits.float().sigmoid()  # (Ri, K)
    # Compare before centerness multiplies in: a low centerness should re-rank a box, not remove it.
    is_candidate = scores > score_thresh
    if centerness is not None:
        scores = scores * centerness.float().sigmoid().unsqueeze(1)
        if sqrt_score:
            scores = scores.sqrt()
    idxs = is_candidate.flatten().nonzero().squeeze(1)
    scores = scores.flatten()[idxs]
    # Sorting and slicing, unlike topk, means the same for any number of candidates when traced.
    scores, order = scores.sort(descending=True, stable=True)
    scores, idxs = scores[:topk], idxs[order[:topk]]
    anchor_idxs = torch.div(idxs, num_classes, rounding_mode="floor")
    boxes = apply_deltas(deltas[anchor_idxs], anchors[anchor_idxs])
    return Candidates(boxes, scores, idxs % num_classes)


def suppress(candidates: Candidates, nms_thresh: float = 0.6, max_detections: int = 100) -> Tensor:
    """Remove boxes that repeat a better one of the same class.

    Args:
        candidates: of one image, all levels joined.
        nms_thresh: IoU above which the lower score goes.
        max_detections: how many to keep; negative keeps all.

    Returns:
        (D',) int64 indices of the boxes kept, by falling score.
    """
    keep = batched_nms(candidates.boxes, candidates.scores, candidates.classes, nms_thresh)
    return keep[:max_detections] if max_detections >= 0 else keep


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
        predictions: raw output of the head, L tensors each.
        anchors: L `Boxes`.
        image_sizes: N (height, width) in pixels, before padding.
        apply_deltas: `(deltas, anchors) -> boxes` of the box transform.
        score_thresh, topk, sqrt_score: see `select_candidates`.
        nms_thresh, max_detections: see `suppress`.
        box_offset: pixels added to x and y of every box before clipping, for weights trained in
            another convention of pixel coordinates.

    Returns:
        N `Instances` with `pred_boxes`, `scores` and `pred_classes`, by falling score.
    """
    num_anchors = predictions.deltas[0].shape[1] // 4
    logits = [flatten_level(level, num_anchors) for level in predictions.logits]
    deltas = [flatten_level(level, num_anchors) for level in predictions.deltas]
    centerness: List[Optional[Tensor]] = [None] * len(logits)
    if predictions.centerness is not None:
        centerness = [flatten_level(c, num_anchors).squeeze(2) for c in predictions.centerness]

    results = []
    for i, image_size in enumerate(image_sizes):
        levels = [
            select_candidates(
                logits_i[i],
                deltas_i[i],
                None if centerness_i is None else centerness_i[i],
                anchors_i.tensor,
                apply_deltas,
                score_thresh,
                topk,
                sqrt_score,
            )
            for logits_i, deltas_i, centerness_i, anchors_i in zip(
                logits, deltas, centerness, anchors
            )
        ]
        candidates = Candidates(*(torch.cat(parts) for parts in zip(*levels)))
        boxes = Boxes(candidates.boxes + box_offset)
        boxes.clip(image_size)
        # A box wholly outside has no area left: NMS would never remove it, and it would take the
        # place of another among the best. (The authors' clipping leaves it a pixel.)
        is_inside = boxes.nonempty()
        candidates = Candidates(*(part[is_inside] for part in (boxes.tensor, *candidates[1:])))
        keep = suppress(candidates, nms_thresh, max_detections)
        result = Instances(image_size)
        result.pred_boxes = Boxes(candidates.boxes[keep])
        result.scores = candidates.scores[keep]
        result.pred_classes = candidates.classes[keep]
        results.append(result)
    return results
