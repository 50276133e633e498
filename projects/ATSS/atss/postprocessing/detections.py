"""Detections of a one-stage detector: the settings of their selection, and the result."""

from typing import List, Sequence, Tuple

import torch

from detectron2.structures import Boxes, Instances

from ..anchors import GraphBoxes
from ..checks import check_integer, check_range
from ..predictions import DensePredictions
from .eager import Decode, Detections, select_candidates, suppress
from .traceable import ClassNMS, detect_in_graph, nms_per_class


class DetectionSelector:
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

    is_first_stage = False

    def __init__(
        self,
        score_thresh: float = 0.05,
        topk_candidates: int = 1000,
        nms_thresh: float = 0.6,
        detections_per_image: int = 100,
        sqrt_score: bool = True,
    ):
        owner, key = "DetectionSelector", "model.selector"
        self.score_thresh = check_range(
            owner, "score_thresh", score_thresh, 0, 1, f"{key}.score_thresh"
        )
        self.topk_candidates = check_integer(
            owner, "topk_candidates", topk_candidates, 1, f"{key}.topk_candidates"
        )
        self.nms_thresh = check_range(owner, "nms_thresh", nms_thresh, 0, 1, f"{key}.nms_thresh")
        self.detections_per_image = check_integer(
            owner, "detections_per_image", detections_per_image, -1, f"{key}.detections_per_image"
        )
        self.sqrt_score = sqrt_score

    @torch.no_grad()
    def __call__(
        self,
        predictions: DensePredictions,
        anchors: Sequence[Boxes],
        image_sizes: Sequence[Tuple[int, int]],
        decode: Decode,
        training: bool = False,
    ) -> List[Instances]:
        """Detections of a batch.

        Args:
            predictions: raw output of the head, L tensors each.
            anchors: L `Boxes`.
            image_sizes: N (height, width) in pixels, before padding.
            decode: `(deltas, anchors) -> boxes`, (P, 4) each, boxes xyxy in pixels.
            training: detections are the same in training and in evaluation.

        Returns:
            N `Instances` with `pred_boxes`, `scores` and `pred_classes`, by falling score.
        """
        if torch.jit.is_tracing():
            # Fast code has branches on sizes and values, and a trace keeps those of its example.
            found = self.in_graph(predictions, anchors, image_sizes, decode)
            return [_instances(s, x, GraphBoxes(x.boxes)) for s, x in zip(image_sizes, found)]
        batch = self.candidates(predictions, anchors, image_sizes, decode)
        found = [self.suppress(candidates) for candidates in batch]
        return [_instances(s, x, Boxes(x.boxes)) for s, x in zip(image_sizes, found)]

    def candidates(
        self,
        predictions: DensePredictions,
        anchors: Sequence[Boxes],
        image_sizes: Sequence[Tuple[int, int]],
        decode: Decode,
    ) -> List[Detections]:
        """What goes into NMS, for each of N images: see `eager.select_candidates`."""
        return select_candidates(
            predictions,
            anchors,
            image_sizes,
            decode,
            self.score_thresh,
            self.topk_candidates,
            self.sqrt_score,
        )

    def suppress(self, candidates: Detections) -> Detections:
        """What NMS leaves of the candidates of one image, the best of it, by falling score."""
        keep = suppress(candidates, self.nms_thresh, self.detections_per_image)
        return Detections(*(part[keep] for part in candidates))

    def in_graph(
        self,
        predictions: DensePredictions,
        anchors: Sequence[Boxes],
        image_sizes: Sequence[Tuple[int, int]],
        decode: Decode,
        nms: ClassNMS = nms_per_class,
    ) -> List[Detections]:
        """The same detections without branches on values: see `traceable.detect_in_graph`."""
        return detect_in_graph(
            predictions,
            anchors,
            image_sizes,
            decode,
            self.score_thresh,
            self.topk_candidates,
            self.nms_thresh,
            self.detections_per_image,
            self.sqrt_score,
            nms,
        )


def _instances(image_size: Tuple[int, int], detections: Detections, boxes: Boxes) -> Instances:
    instances = Instances(image_size)
    instances.pred_boxes = boxes
    instances.scores = detections.scores
    instances.pred_classes = detections.classes
    return instances
