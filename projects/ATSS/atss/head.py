"""What is predicted at each location? (axis 3, the improvements that any detector can have)

RetinaNet's two towers shared over levels, with the universal improvements of Table 1 as independent
switches: GroupNorm, centerness, one scale per level.
"""

import math
from typing import List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from detectron2.layers import get_norm
from detectron2.utils.registry import Registry

from .layers import LevelScale, PackedDeformConv2d

__all__ = ["ATSS_HEAD_REGISTRY", "ATSSHead", "DensePredictions"]

ATSS_HEAD_REGISTRY = Registry("ATSS_HEAD")
ATSS_HEAD_REGISTRY.__doc__ = """
Heads of dense detectors: list of (N, C, Hi, Wi) -> `DensePredictions`.
Called with the keyword arguments of the registered class.
"""

_KNOWN_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN")


class DensePredictions(NamedTuple):
    """Raw output of a head, per level: lists of L tensors.

    Attributes:
        logits: (N, A*K, Hi, Wi) class logits, anchors before classes on axis 1.
        deltas: (N, A*4, Hi, Wi) box deltas in the terms of the box transform.
        centerness: (N, A, Hi, Wi) centerness logits, or None for a head without.
    """

    logits: List[Tensor]
    deltas: List[Tensor]
    centerness: Optional[List[Tensor]]


@ATSS_HEAD_REGISTRY.register()
class ATSSHead(nn.Module):
    """Two convolutional towers, and predictors for class, box and centerness (Fig. 2 of FCOS).

    All weights but the scales are shared over levels. Centerness shares the tower of the boxes.

    Args:
        in_channels: channels of every feature map, also of the towers.
        num_classes: K, without background.
        num_anchors: A, anchors per location.
        num_levels: L, as many scales are made.
        num_convs: convolutions in each tower.
        norm: normalisation after each of them, by Detectron2's names; "" for none. "GN" has 32
            groups. Batch statistics ("BN", "SyncBN") are shared over levels.
        centerness: predict centerness.
        level_scales: multiply the deltas of each level with a learned factor.
        deformable: make the last convolution of both towers deformable, DCNv2.
        conv_bias: give tower convolutions a bias; the authors do, mmdetection does not.
        bbox_bias: initial bias of the deltas: 0 for boxes, 4 for points.
        prior_prob: initial class probability of every anchor, in (0, 1) (focal loss paper, 4.1).

    Raises:
        ValueError: for an unknown norm, channels that GroupNorm cannot group, or numbers out of
            range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        num_anchors: int = 1,
        num_levels: int = 5,
        num_convs: int = 4,
        norm: str = "GN",
        centerness: bool = True,
        level_scales: bool = True,
        deformable: bool = False,
        conv_bias: bool = True,
        bbox_bias: float = 0.0,
        prior_prob: float = 0.01,
    ):
        super().__init__()
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("num_classes", num_classes, 1),
            ("num_anchors", num_anchors, 1),
            ("num_levels", num_levels, 1),
            ("num_convs", num_convs, 0),
        ):
            if value < least:
                raise ValueError(f"ATSSHead needs {name} >= {least}, got {value}.")
        if not 0.0 < prior_prob < 1.0:
            raise ValueError(f"ATSSHead needs prior_prob in (0, 1), got {prior_prob}.")
        if isinstance(norm, str) and norm not in _KNOWN_NORMS:
            raise ValueError(
                f"Unknown norm {norm!r} for model.head.norm; known are {list(_KNOWN_NORMS)}."
            )
        if norm == "GN" and in_channels % 32:
            raise ValueError(
                f"GroupNorm has 32 groups, which do not divide in_channels={in_channels}. Give the "
                "head a multiple of 32 channels, or another norm."
            )
        if deformable and num_convs == 0:
            raise ValueError(
                "ATSSHead makes the last convolution of its towers deformable, but num_convs is 0. "
                "Give model.head.num_convs at least 1, or deformable=False."
            )
        self.num_classes = num_classes
        self.num_anchors = num_anchors
        self.num_levels = num_levels

        def make_tower() -> nn.Sequential:
            layers: List[nn.Module] = []
            for i in range(num_convs):
                conv = PackedDeformConv2d if deformable and i == num_convs - 1 else nn.Conv2d
                layers.append(conv(in_channels, in_channels, 3, padding=1, bias=conv_bias))
                if norm:
                    layers.append(get_norm(norm, in_channels))
                layers.append(nn.ReLU())
            return nn.Sequential(*layers)

        self.cls_tower = make_tower()
        self.bbox_tower = make_tower()
        self.cls_logits = nn.Conv2d(in_channels, num_anchors * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(in_channels, num_anchors * 4, 3, padding=1)
        self.centerness = nn.Conv2d(in_channels, num_anchors, 3, padding=1) if centerness else None
        self.scales = nn.ModuleList(
            LevelScale() if level_scales else nn.Identity() for _ in range(num_levels)
        )
        # Offset convolutions are among these; deformable ones keep the scale that Detectron2 gives
        # them, as in the authors' release.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - prior_prob) / prior_prob))
        nn.init.constant_(self.bbox_pred.bias, bbox_bias)

    def forward(self, features: Sequence[Tensor]) -> DensePredictions:
        """Predict at every location of every level.

        Args:
            features: L feature maps (N, C, Hi, Wi), in the order of the levels.

        Returns:
            `DensePredictions`, L tensors each.
        """
        assert len(features) == self.num_levels, (len(features), self.num_levels)
        logits: List[Tensor] = []
        deltas: List[Tensor] = []
        centerness: List[Tensor] = []
        for feature, scale in zip(features, self.scales):
            logits.append(self.cls_logits(self.cls_tower(feature)))
            bbox_feature = self.bbox_tower(feature)
            deltas.append(scale(self.bbox_pred(bbox_feature)))
            if self.centerness is not None:
                centerness.append(self.centerness(bbox_feature))
        return DensePredictions(logits, deltas, centerness if centerness else None)


def flatten_level(prediction: Tensor, num_anchors: int) -> Tensor:
    """Bring the predictions of a level into the order of its anchors: row, column, anchor.

    Args:
        prediction: (N, A*D, Hi, Wi).
        num_anchors: A.

    Returns:
        (N, Hi*Wi*A, D).
    """
    num_images, channels, height, width = prediction.shape
    prediction = prediction.view(num_images, num_anchors, channels // num_anchors, height, width)
    return prediction.permute(0, 3, 4, 1, 2).reshape(num_images, -1, channels // num_anchors)


def flatten_levels(predictions: Sequence[Tensor], num_anchors: int) -> Tensor:
    """Predictions of all levels in the order of the R anchors of an image.

    Args:
        predictions: L tensors (N, A*D, Hi, Wi).
        num_anchors: A.

    Returns:
        (N, R, D).
    """
    return torch.cat([flatten_level(level, num_anchors) for level in predictions], dim=1)
