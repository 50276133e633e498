"""What a selection of boxes is given, the settings of that of detections, and what it finds."""

from typing import Callable, NamedTuple, Sequence, Tuple, Union

import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances

from ..anchor_grid import GraphBoxes
from ..checks import check_integer, check_range
from ..predictions import DensePredictions

Decode = Callable[[Tensor, Tensor], Tensor]
# Heights and widths: numbers, or tensors of one number under `torch.jit.trace`.
Size = Union[int, Tensor]


class SelectionInputs(NamedTuple):
    """Output of the head on a batch, and what turns it into boxes.

    Attributes:
        predictions: raw output of the head, L tensors each.
        anchors: L `Boxes`.
        image_sizes: N (height, width) in pixels, before padding.
        decode: `(deltas, anchors) -> boxes`, (P, 4) each, boxes xyxy in pixels.
    """

    predictions: DensePredictions
    anchors: Sequence[Boxes]
    image_sizes: Sequence[Tuple[Size, Size]]
    decode: Decode


class Detections(NamedTuple):
    """Scored boxes of one image, before suppression (candidates) or after it.

    Attributes:
        boxes: (D, 4) xyxy in pixels of the network's input.
        scores: (D,) in [0, 1].
        classes: (D,) int64 in 0..K-1.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    def at(self, idxs: Union[Tensor, slice]) -> "Detections":
        """Those at indices, under a mask or in a slice."""
        return Detections(*(part[idxs] for part in self))

    def to_instances(self, image_size: Tuple[Size, Size]) -> Instances:
        """`Instances` with `pred_boxes`, `scores` and `pred_classes`."""
        boxes = (GraphBoxes if torch.jit.is_tracing() else Boxes)(self.boxes)
        return Instances(
            image_size, pred_boxes=boxes, scores=self.scores, pred_classes=self.classes
        )


class DetectionSettings:
    """Which predictions are detections (Sec. 3.1; values of the authors' release).

    Args:
        score_thresh: least class score of a detection, before quality, exclusive.
        topk_candidates: how many candidates a level hands to NMS.
        nms_thresh: IoU above which the box of lower score is removed, of two of a class.
        detections_per_image: most detections of an image; -1 for no limit.
        sqrt_score: score is sqrt(class * quality), the authors' formula, instead of the plain
            product; ranks the same.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(
        self,
        score_thresh: float = 0.05,
        topk_candidates: int = 1000,
        nms_thresh: float = 0.6,
        detections_per_image: int = 100,
        sqrt_score: bool = True,
    ):
        self.score_thresh = score_thresh
        self.topk_candidates = topk_candidates
        self.nms_thresh = nms_thresh
        self.detections_per_image = detections_per_image
        self.sqrt_score = sqrt_score
        owner, node = type(self).__name__, "model.selector"
        for name in ("score_thresh", "nms_thresh"):
            check_range(owner, name, getattr(self, name), 0, 1, f"{node}.{name}")
        for name, least in (("topk_candidates", 1), ("detections_per_image", -1)):
            check_integer(owner, name, getattr(self, name), least, f"{node}.{name}")
