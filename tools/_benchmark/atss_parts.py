"""ATSS's assignment, losses and post-processing, as the benchmark calls them.

The only file of the benchmark that knows how the package calls its parts.
"""

from typing import Dict, List, Sequence

import torch
from atss.model_zoo import get_config
from atss.postprocessing import SelectionInputs
from atss.predictions import DensePredictions
from atss.targets import Targets, label_anchors
from omegaconf import DictConfig
from torch import Tensor

from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances

from .cases import Levels, Size
from .synthetic import empty_features


def full_method(num_classes: int, anchors_per_location: int = 1) -> DictConfig:
    """Config of the paper's model, with one square per location or RetinaNet's nine anchors."""
    model = get_config("coco/atss_R_50_FPN_1x").model
    model.num_classes = num_classes
    if anchors_per_location == 9:
        model.anchor_generator.sizes.update(scale=4, scales_per_octave=3)
        model.anchor_generator.aspect_ratios = [0.5, 1.0, 2.0]
    return model


class ATSSParts:
    """ATSS without its network, with the anchors of one image size.

    Args:
        model: of `full_method`.
        image_size: (height, width).
        device: of the anchors.
    """

    mean_delta = 0.0
    has_centerness = True

    def __init__(self, model: DictConfig, image_size: Size, device: torch.device):
        generator = instantiate(model.anchor_generator).to(device)
        features = empty_features(image_size, device)
        self.anchors: List[Boxes] = generator(features)
        self.transform = instantiate(model.box2box_transform)
        self._grid = generator.grid(features)
        self._assigner = instantiate(model.assigner)
        self._loss = instantiate(model.loss)
        self._selector = instantiate(model.selector)
        self._num_classes = model.num_classes
        self._image_size = image_size

    def label_anchors(self, gt_instances: Sequence[Instances]) -> Targets:
        return label_anchors(self._assigner, self._grid, gt_instances, self._num_classes)

    def losses(
        self, logits: Levels, deltas: Levels, centerness: Levels, labels: Targets
    ) -> Dict[str, Tensor]:
        return self._loss(self._predictions(logits, deltas, centerness), self._grid, labels)

    def detect(self, logits: Levels, deltas: Levels, centerness: Levels) -> List[Instances]:
        predictions = self._predictions(logits, deltas, centerness)
        image_sizes = [self._image_size] * len(logits[0])
        decode = self.transform.apply_deltas
        return self._selector(SelectionInputs(predictions, self.anchors, image_sizes, decode))

    def _predictions(self, *levels: Levels) -> DensePredictions:
        return DensePredictions(*levels, self._grid.num_cell_anchors)
