"""Assignment, losses and post-processing of Detectron2's models, called as ours are."""

from typing import Any, Dict, List, Sequence

import torch
from _reference_models import fcos, retinanet, without_network
from omegaconf import DictConfig
from torch import Tensor

from detectron2.modeling.meta_arch.retinanet import permute_to_N_HWA_K
from detectron2.structures import ImageList, Instances

from .cases import Levels, Size
from .synthetic import empty_features


class RetinaNetParts:
    """RetinaNet with the anchors, deltas and box loss of ATSS, so that the work is equal.

    Args:
        model: config of the ATSS model.
        image_size: (height, width).
        device: of the anchors.
    """

    mean_delta = 0.0
    has_centerness = False

    def __init__(self, model: DictConfig, image_size: Size, device: torch.device):
        self.model = self._build(model).to(device)
        self._features = empty_features(image_size, device)
        self.anchors = self.model.anchor_generator(self._features)
        self.transform = self.model.box2box_transform
        self._image_size = image_size

    def _build(self, model: DictConfig) -> torch.nn.Module:
        config = retinanet(model)
        config.box2box_transform.weights = model.box2box_transform.weights
        changes = {"anchor_generator": model.anchor_generator, "box_reg_loss_type": "giou"}
        return without_network(config, **changes, test_nms_thresh=0.6)

    def label_anchors(self, gt_instances: Sequence[Instances]) -> Any:
        return self.model.label_anchors(self.anchors, gt_instances)

    def losses(
        self, logits: Levels, deltas: Levels, centerness: Levels, labels: Any
    ) -> Dict[str, Tensor]:
        classes, boxes = labels
        rest = [self._rows(centerness, 1)] if self.has_centerness else []
        return self.model.losses(
            self.anchors, self._logits(logits), classes, self._rows(deltas, 4), boxes, *rest
        )

    def detect(self, logits: Levels, deltas: Levels, centerness: Levels) -> List[Instances]:
        predictions = [logits, deltas, *([centerness] if self.has_centerness else [])]
        image_sizes = [self._image_size] * len(logits[0])
        if hasattr(self.model, "forward_inference"):
            images = ImageList(torch.empty(0), image_sizes)
            return self.model.forward_inference(images, self._features, predictions)
        # Detectron2 up to 0.6
        rows = self._logits(logits), self._rows(deltas, 4)
        return self.model.inference(self.anchors, *rows, image_sizes)

    def _logits(self, logits: Levels) -> Levels:
        return self._rows(logits, self.model.num_classes)

    @staticmethod
    def _rows(levels: Levels, channels: int) -> Levels:
        """Head outputs (N, A*D, Hi, Wi) as (N, Hi*Wi*A, D), by Detectron2's own function."""
        return [permute_to_N_HWA_K(level, channels) for level in levels]


class FCOSParts(RetinaNetParts):
    """FCOS with its own points and losses; see `RetinaNetParts`."""

    mean_delta = 4.0
    has_centerness = True

    def _build(self, model: DictConfig) -> torch.nn.Module:
        return without_network(fcos(model))
