"""Detections of a one-stage detector."""

from typing import List

import torch

from detectron2.structures import Instances

from .eager import select_candidates, suppress
from .selection import Detections, DetectionSettings, SelectionInputs
from .traceable import ClassNMS, detect_in_graph, nms_per_class


class DetectionSelector(DetectionSettings):
    """Selection of detections, with the arguments of `DetectionSettings`.

    Called with `SelectionInputs` it gives N `Instances` with `pred_boxes`, `scores` and
    `pred_classes`, by falling score.
    """

    is_first_stage = False

    @torch.no_grad()
    def __call__(self, inputs: SelectionInputs, training: bool = False) -> List[Instances]:
        """Detections of a batch, the same in training and in evaluation."""
        if torch.jit.is_tracing():
            # Fast code has branches on sizes and values, and a trace keeps those of its example.
            found = self.in_graph(inputs)
        else:
            found = [self.suppress(candidates) for candidates in self.candidates(inputs)]
        return [result.to_instances(size) for size, result in zip(inputs.image_sizes, found)]

    def candidates(self, inputs: SelectionInputs) -> List[Detections]:
        """What goes into NMS, for each of N images: see `eager.select_candidates`."""
        return select_candidates(inputs, self)

    def suppress(self, candidates: Detections) -> Detections:
        """What NMS leaves of the candidates of one image, the best of it, by falling score."""
        return suppress(candidates, self.nms_thresh, self.detections_per_image)

    def in_graph(self, inputs: SelectionInputs, nms: ClassNMS = nms_per_class) -> List[Detections]:
        """The same detections without branches on values: see `traceable.detect_in_graph`."""
        return detect_in_graph(inputs, self, nms)
