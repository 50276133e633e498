"""Axis 3 of 4: the head and, in `losses/`, its losses.

RetinaNet's two towers shared over levels, with the universal improvements of Table 1 as independent
switches: GroupNorm, centerness, one scale per level.
"""

import math
from typing import List, Sequence

import torch
from torch import Tensor, nn

from detectron2.layers import get_norm
from detectron2.utils.registry import Registry

from .checks import check_choice, check_integer, check_range
from .layers import PackedDeformConv2d
from .predictions import DensePredictions

ATSS_HEAD_REGISTRY = Registry("ATSS_HEAD")
ATSS_HEAD_REGISTRY.__doc__ = """
Heads of dense detectors: list of (N, C, Hi, Wi) -> `DensePredictions`.
Called with the keyword arguments of the registered class.
"""

_KNOWN_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN")


class LevelScale(nn.Module):
    """One learned factor for one pyramid level, so that levels share a head (Table 1, last row).

    Args:
        initial: value at the start of training.
    """

    def __init__(self, initial: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (N, C, H, W) by the factor."""
        return x * self.scale


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
            groups, of one channel each where `in_channels` is 32, which is instance norm. Batch
            statistics ("BN", "SyncBN") are shared over levels.
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
            check_integer("ATSSHead", name, value, least, f"model.head.{name}")
        key = "model.head.prior_prob"
        check_range("ATSSHead", "prior_prob", prior_prob, 0, 1, key, ends="()")
        if isinstance(norm, str):
            check_choice("ATSSHead", "norm", norm, _KNOWN_NORMS, "model.head.norm")
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
        self.bbox_bias = bbox_bias
        self._has_groups_of_one = norm == "GN" and in_channels == 32 and num_convs > 0

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

        Raises:
            ValueError: for GroupNorm of single channels on a single value of each.
        """
        assert len(features) == self.num_levels, (len(features), self.num_levels)
        if self._has_groups_of_one and features[-1].numel() == features[-1].shape[1]:
            raise ValueError(
                "GroupNorm's 32 groups of a head with 32 channels have one value each on a level "
                "of 1x1, as P7 of an image up to 128 px is. Give model.backbone.out_channels "
                "(MODEL.FPN.OUT_CHANNELS) 64, model.head.norm (MODEL.ATSS.HEAD.NORM) '', or larger "
                "images."
            )
        logits: List[Tensor] = []
        deltas: List[Tensor] = []
        centerness: List[Tensor] = []
        for feature, scale in zip(features, self.scales):
            logits.append(self.cls_logits(self.cls_tower(feature)))
            bbox_feature = self.bbox_tower(feature)
            deltas.append(scale(self.bbox_pred(bbox_feature)))
            if self.centerness is not None:
                centerness.append(self.centerness(bbox_feature))
        return DensePredictions(logits, deltas, centerness or None, self.num_anchors)
