"""ATSS's anchors, assignment, losses and post-processing, as the benchmark calls them.

The only file of the benchmark that knows how the package calls its parts.
"""

from typing import Dict, List, Sequence, Tuple

import torch
from atss.head import DensePredictions
from atss.model_zoo import get_config
from atss.postprocessing.eager import detect
from atss.targets import Targets, label_anchors
from omegaconf import DictConfig
from torch import Tensor

from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances


def full_method(num_classes: int, anchors_per_location: int = 1) -> DictConfig:
    """Config of the paper's model, with one square per location or RetinaNet's nine anchors."""
    model = get_config("coco/atss_R_50_FPN_1x").model
    model.num_classes = num_classes
    if anchors_per_location == 9:
        model.anchor_generator.sizes.update(scale=4, scales_per_octave=3)
        model.anchor_generator.aspect_ratios = [0.5, 1.0, 2.0]
    return model


class ATSSParts:
    """The parts of a detector that are not its network.

    Args:
        model: of `full_method`.
        grid_sizes: (Hi, Wi) of the levels.
        device: of the anchors.
    """

    def __init__(self, model: DictConfig, grid_sizes: Sequence[Tuple[int, int]], device):
        generator = instantiate(model.anchor_generator).to(device)
        self.features = [torch.empty(1, 0, *size, device=device) for size in grid_sizes]
        self.grid = generator.grid(self.features)
        self.anchors: List[Boxes] = generator(self.features)
        self.transform = instantiate(model.box2box_transform)
        self._assigner = instantiate(model.assigner)
        self._loss = instantiate(model.loss)
        self._num_classes = model.num_classes

    def label_anchors(self, gt_instances: Sequence[Instances]) -> Targets:
        return label_anchors(self._assigner, self.grid, gt_instances, self._num_classes)

    def losses(
        self,
        logits: List[Tensor],
        deltas: List[Tensor],
        centerness: List[Tensor],
        targets: Targets,
    ) -> Dict[str, Tensor]:
        return self._loss(DensePredictions(logits, deltas, centerness), self.grid, targets)

    def detect(
        self,
        predictions: Sequence[List[Tensor]],
        image_sizes: Sequence[Tuple[int, int]],
    ) -> List[Instances]:
        """Detections from logits, deltas and centerness by level."""
        predictions = DensePredictions(*predictions)
        return detect(predictions, self.anchors, image_sizes, self.transform.apply_deltas)
