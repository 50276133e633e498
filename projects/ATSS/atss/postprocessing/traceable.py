"""Selection of detections in a form that a graph can hold.

The same answers as `eager.py`, whose speed comes from branches on sizes, numbers of boxes and
values. A graph would keep the branch of its example image, so here there are none: one way for
every image size and every number of boxes, none included.
"""

from typing import Callable, List, Optional, Tuple

import torch
import torchvision
from torch import Tensor

from ..predictions import flatten_level
from .eager import logit
from .selection import Decode, Detections, DetectionSettings, SelectionInputs, Size

ClassNMS = Callable[[Tensor, Tensor, Tensor, float], Tensor]


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
        nms_thresh: IoU above which the worse of two boxes is removed.

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


def detect_in_graph(
    inputs: SelectionInputs, settings: DetectionSettings, nms: ClassNMS = nms_per_class
) -> List[Detections]:
    """Detections of a batch, as `select_candidates` and `suppress` of `eager.py` find them.

    Args:
        inputs: sizes of images may be tensors under `torch.jit.trace`.
        settings: of the selection.
        nms: `(boxes, ranks, classes, nms_thresh) -> indices`; boxes come best first.

    Returns:
        N `Detections`, by falling score.
    """
    predictions, anchors, image_sizes, decode = inputs
    maps = [predictions.logits, predictions.deltas]
    if predictions.quality is not None:
        maps.append(predictions.quality)
    levels = [
        [flatten_level(values, predictions.num_anchors) for values in level] for level in zip(*maps)
    ]  # of each level logits (N, Ri, K), deltas (N, Ri, 4) and maybe quality (N, Ri, 1)

    results = []
    for i, (height, width) in enumerate(image_sizes):
        found = [
            _select_candidates(settings, decode, boxes.tensor, *(values[i] for values in level))
            for boxes, level in zip(anchors, levels)
        ]
        boxes, scores, classes = (torch.cat(parts) for parts in zip(*found))
        boxes = _clip(boxes, height, width)
        # A box wholly outside has no area left, and NMS would never remove it.
        is_inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        scores, order = scores[is_inside].sort(descending=True, stable=True)
        boxes, classes = boxes[is_inside][order], classes[is_inside][order]
        # Ranks in place of scores: equal scores then mean the same to every implementation of NMS.
        ranks = torch.ones_like(scores).cumsum(0).flip(0)  # D to 1
        keep = nms(boxes, ranks, classes, settings.nms_thresh)
        if settings.detections_per_image >= 0:
            keep = keep[: settings.detections_per_image]
        results.append(Detections(boxes, scores, classes).at(keep))
    return results


def _select_candidates(
    settings: DetectionSettings,
    decode: Decode,
    anchors: Tensor,
    logits: Tensor,
    deltas: Tensor,
    quality: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Best predictions of one level of one image: boxes, scores, classes.

    Args:
        settings, decode: of the selection.
        anchors: (Ri, 4) xyxy in pixels.
        logits: (Ri, K) class logits.
        deltas: (Ri, 4).
        quality: (Ri, 1) logits or None.
    """
    num_classes = logits.shape[1]
    # Compare before quality multiplies in: a low one should re-rank a box, not remove it.
    anchor_idxs, classes = (logits.float() > logit(settings.score_thresh)).nonzero().unbind(dim=1)
    idxs = anchor_idxs * num_classes + classes
    scores = logits.reshape(-1)[idxs].float().sigmoid()
    if quality is not None:
        scores = scores * quality.reshape(-1)[anchor_idxs].float().sigmoid()
        if settings.sqrt_score:
            scores = scores.sqrt()
    # Sorting and slicing, unlike topk, means the same for any number of candidates.
    scores, order = scores.sort(descending=True, stable=True)
    scores, order = scores[: settings.topk_candidates], order[: settings.topk_candidates]
    anchor_idxs, classes = anchor_idxs[order], classes[order]
    boxes = decode(deltas[anchor_idxs], anchors[anchor_idxs])
    return boxes, scores, classes


def _clip(boxes: Tensor, height: Size, width: Size) -> Tensor:
    # `Boxes.clip` without its assertion on values, which a graph cannot hold.
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    columns = [x1.clamp(min=0, max=width), y1.clamp(min=0, max=height)]
    columns += [x2.clamp(min=0, max=width), y2.clamp(min=0, max=height)]
    return torch.stack(columns, dim=1)
