"""Which of the raw predictions are detections, in a form that a graph can hold?

The same answers as `postprocessing.py`, whose speed comes from branches on sizes, numbers of boxes
and values. A graph would keep the branch of its example image, so here there are none: one way for
every image size and every number of boxes, none included. `torch.jit.trace` of the detector comes
here by itself.
"""

import math
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torchvision
from torch import Tensor

from detectron2.structures import Boxes, Instances

from ..anchors import GraphBoxes
from ..head import DensePredictions, flatten_level

__all__ = [
    "GraphDetections",
    "detect",
    "detect_instances",
    "move_like",
    "nms_per_class",
]

# Heights and widths: numbers, or tensors of one number under `torch.jit.trace`.
Size = Union[int, Tensor]
ClassNMS = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class GraphDetections(NamedTuple):
    """Detections of one image, by falling score.

    Attributes:
        boxes: (D, 4) xyxy in pixels.
        scores: (D,) in [0, 1].
        classes: (D,) int64 in 0..K-1.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor


@torch.jit.script_if_tracing
def move_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor on the device of another; a trace asks for that device in every run.

    Args:
        tensor: of any shape.
        like: on the wanted device.
    """
    return tensor.to(like.device, non_blocking=True)


def nms_per_class(boxes: Tensor, ranks: Tensor, classes: Tensor, nms_thresh: float) -> Tensor:
    """Suppress boxes that repeat a better one of their class.

    torchvision's `batched_nms` returns early without boxes and changes its method with their
    number. Here classes are always moved apart; in float64, so that far from the origin the boxes
    keep the digits that decide about their overlap.

    Args:
        boxes: (D, 4) xyxy in pixels.
        ranks: (D,) positive, higher is better, no two alike.
        classes: (D,) int64.
        nms_thresh: IoU above which the worse of two boxes goes.

    Returns:
        int64 indices of the boxes kept, best first.
    """
    # Two empty boxes of the lowest rank, which nothing suppresses: torch.export takes for granted
    # that torchvision's NMS keeps two boxes at least.
    boxes = torch.cat((boxes, boxes.new_zeros(2, 4))).double()
    ranks = torch.cat((ranks, ranks.new_zeros(2))).double()
    classes = torch.cat((classes, classes.new_zeros(2)))
    offsets = classes * (boxes.max() + 1)
    return torchvision.ops.nms(boxes + offsets.unsqueeze(1), ranks, nms_thresh)[:-2]


def detect(
    predictions: DensePredictions,
    anchors: Sequence[Boxes],
    image_sizes: Sequence[Tuple[Size, Size]],
    apply_deltas: Callable[[Tensor, Tensor], Tensor],
    score_thresh: float = 0.05,
    topk: int = 1000,
    nms_thresh: float = 0.6,
    max_detections: int = 100,
    sqrt_score: bool = True,
    box_offset: float = 0.0,
    nms: ClassNMS = nms_per_class,
) -> List[GraphDetections]:
    """Detections of a batch, as `postprocessing.detect` finds them.

    Args:
        predictions: raw output of the head, L tensors each.
        anchors: L `Boxes`.
        image_sizes: N (height, width) in pixels, before padding.
        apply_deltas: `(deltas, anchors) -> boxes` of the box transform.
        score_thresh: least class score before centerness, itself excluded.
        topk: how many candidates a level hands to NMS.
        nms_thresh: see `nms_per_class`.
        max_detections: how many to keep; negative keeps all.
        sqrt_score: score is sqrt(class * centerness) instead of the plain product.
        box_offset: pixels added to x and y of every box before clipping.
        nms: `(boxes, ranks, classes, nms_thresh) -> indices`; boxes come best first.

    Returns:
        N `GraphDetections`.
    """
    num_anchors = predictions.deltas[0].shape[1] // 4
    logits = [flatten_level(level, num_anchors) for level in predictions.logits]
    deltas = [flatten_level(level, num_anchors) for level in predictions.deltas]
    centerness: List[Optional[Tensor]] = [None] * len(logits)
    if predictions.centerness is not None:
        centerness = [flatten_level(level, num_anchors) for level in predictions.centerness]

    results = []
    for i, (height, width) in enumerate(image_sizes):
        levels = [
            _select_candidates(
                logits[j][i],
                deltas[j][i],
                None if centerness[j] is None else centerness[j][i],
                level_anchors.tensor,
                apply_deltas,
                score_thresh,
                topk,
                sqrt_score,
            )
            for j, level_anchors in enumerate(anchors)
        ]
        boxes, scores, classes = (torch.cat(parts) for parts in zip(*levels))
        boxes = _clip(boxes + box_offset, height, width)
        # A box wholly outside has no area left, and NMS would never remove it.
        is_inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        scores, order = scores[is_inside].sort(descending=True, stable=True)
        boxes, classes = boxes[is_inside][order], classes[is_inside][order]
        # Places instead of scores: equal scores then mean the same to every implementation of NMS.
        ranks = torch.ones_like(scores).cumsum(0).flip(0)  # D to 1
        keep = nms(boxes, ranks, classes, nms_thresh)
        if max_detections >= 0:
            keep = keep[:max_detections]
        results.append(GraphDetections(boxes[keep], scores[keep], classes[keep]))
    return results


def detect_instances(
    predictions: DensePredictions,
    anchors: Sequence[Boxes],
    image_sizes: Sequence[Tuple[Size, Size]],
    apply_deltas: Callable[[Tensor, Tensor], Tensor],
    **options,
) -> List[Instances]:
    """`detect` with the answer in Detectron2's terms.

    Args:
        predictions, anchors, image_sizes, apply_deltas, **options: see `detect`.

    Returns:
        N `Instances` with `pred_boxes`, `scores` and `pred_classes`, by falling score.
    """
    results = []
    found = detect(predictions, anchors, image_sizes, apply_deltas, **options)
    for image_size, detections in zip(image_sizes, found):
        result = Instances(image_size)
        result.pred_boxes = GraphBoxes(detections.boxes)
        result.scores = detections.scores
        result.pred_classes = detections.classes
        results.append(result)
    return results


def _select_candidates(
    logits: Tensor,
    deltas: Tensor,
    centerness: Optional[Tensor],
    anchors: Tensor,
    apply_deltas: Callable[[Tensor, Tensor], Tensor],
    score_thresh: float,
    topk: int,
    sqrt_score: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Best predictions of one level of one image: boxes, scores, classes.

    Args:
        logits: (Ri, K) class logits.
        deltas: (Ri, 4).
        centerness: (Ri, 1) centerness logits or None.
        anchors: (Ri, 4) xyxy in pixels.
        apply_deltas, score_thresh, topk, sqrt_score: see `detect`.
    """
    num_classes = logits.shape[1]
    # Compare before centerness multiplies in: a low centerness should re-rank a box, not remove it.
    anchor_idxs, classes = (logits.float() > _logit(score_thresh)).nonzero().unbind(dim=1)
    idxs = anchor_idxs * num_classes + classes
    scores = logits.reshape(-1)[idxs].float().sigmoid()
    if centerness is not None:
        scores = scores * centerness.reshape(-1)[anchor_idxs].float().sigmoid()
        if sqrt_score:
            scores = scores.sqrt()
    # Sorting and slicing, unlike topk, means the same for any number of candidates.
    scores, order = scores.sort(descending=True, stable=True)
    scores, order = scores[:topk], order[:topk]
    anchor_idxs, classes = anchor_idxs[order], classes[order]
    boxes = apply_deltas(deltas[anchor_idxs], anchors[anchor_idxs])
    return boxes, scores, classes


def _logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    return math.log(probability / (1 - probability)) if probability < 1 else math.inf


def _clip(boxes: Tensor, height: Size, width: Size) -> Tensor:
    # `Boxes.clip` without its assertion on values, which a graph cannot hold.
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    columns = [x1.clamp(min=0, max=width), y1.clamp(min=0, max=height)]
    columns += [x2.clamp(min=0, max=width), y2.clamp(min=0, max=height)]
    return torch.stack(columns, dim=1)
