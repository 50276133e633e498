"""Detectron2's own dense detectors, to measure beside ours: RetinaNet, and FCOS where it has one.

For parts (assignment, losses, post-processing) they are built without a network: those methods need
only their settings. FCOS came after Detectron2 0.6: `has_fcos` tells.
"""

from typing import Any, List, Sequence

import torch
from atss.anchors import GridAnchorGenerator, octave_sizes
from torch import Tensor, nn

from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead, permute_to_N_HWA_K

try:
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
except ImportError:
    FCOS = None

__all__ = [
    "STRIDES",
    "anchor_generator",
    "empty_features",
    "fcos_detector",
    "fcos_parts",
    "has_fcos",
    "retinanet_detector",
    "retinanet_parts",
    "transpose",
]

STRIDES = (8, 16, 32, 64, 128)
_LEVELS = ["p3", "p4", "p5", "p6", "p7"]
_WITHOUT_NORMALISATION = {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3}


def has_fcos() -> bool:
    """Whether this Detectron2 has FCOS."""
    return FCOS is not None


def anchor_generator(anchors_per_location: int = 1) -> GridAnchorGenerator:
    """The paper's square of eight strides, or RetinaNet's three scales and ratios."""
    if anchors_per_location == 1:
        sizes, ratios = octave_sizes(STRIDES), [1.0]
    else:
        sizes, ratios = octave_sizes(STRIDES, 4, 3), [0.5, 1.0, 2.0]
    return GridAnchorGenerator(sizes=sizes, aspect_ratios=ratios, strides=list(STRIDES))


class _Shapes(nn.Module):
    """Stands where a backbone is expected but never runs."""

    def output_shape(self):
        return _feature_shapes(256)


def _feature_shapes(channels: int):
    return {
        name: ShapeSpec(channels=channels, stride=stride) for name, stride in zip(_LEVELS, STRIDES)
    }


def _retinanet(backbone, head, generator, num_classes, weights, box_loss, **options) -> RetinaNet:
    return RetinaNet(
        backbone=backbone,
        head=head,
        anchor_generator=generator,
        box2box_transform=Box2BoxTransform(weights=weights),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        num_classes=num_classes,
        head_in_features=_LEVELS,
        box_reg_loss_type=box_loss,
        **options,
    )


def retinanet_parts(num_classes: int, anchors_per_location: int = 1) -> RetinaNet:
    """RetinaNet for its `label_anchors`, `losses` and `inference`, on our anchors, with GIoU."""
    generator = anchor_generator(anchors_per_location)
    weights = (10.0, 10.0, 5.0, 5.0)
    return _retinanet(
        _Shapes(), nn.Identity(), generator, num_classes, weights, "giou", **_WITHOUT_NORMALISATION
    )


def fcos_parts(num_classes: int) -> Any:
    """FCOS for its `label_anchors`, `losses` and `forward_inference`."""
    return FCOS(
        backbone=_Shapes(),
        head=nn.Identity(),
        num_classes=num_classes,
        head_in_features=_LEVELS,
        **_WITHOUT_NORMALISATION,
    )


def retinanet_detector(backbone: nn.Module, model: Any, num_convs: int) -> RetinaNet:
    """RetinaNet as Detectron2's configs have it, nine anchors, on a backbone of ours.

    Args:
        backbone: FPN with P3 to P7.
        model: config of the ATSS detector it is compared with, for classes, channels, pixels.
        num_convs: convolutions of each tower.
    """
    channels = model.backbone.out_channels
    head = RetinaNetHead(
        input_shape=list(_feature_shapes(channels).values()),
        num_classes=model.num_classes,
        conv_dims=[channels] * num_convs,
        num_anchors=9,
    )
    generator = DefaultAnchorGenerator(
        sizes=octave_sizes(STRIDES, 4, 3),
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=list(STRIDES),
        offset=0.0,
    )
    options = {"pixel_mean": list(model.pixel_mean), "pixel_std": list(model.pixel_std)}
    return _retinanet(
        backbone, head, generator, model.num_classes, (1.0,) * 4, "smooth_l1", **options
    )


def fcos_detector(backbone: nn.Module, model: Any, num_convs: int) -> Any:
    """FCOS with GroupNorm, that is with the head of ATSS, on a backbone of ours.

    Args:
        backbone, model, num_convs: see `retinanet_detector`.
    """
    channels = model.backbone.out_channels
    head = FCOSHead(
        input_shape=list(_feature_shapes(channels).values()),
        num_classes=model.num_classes,
        conv_dims=[channels] * num_convs,
        norm="GN",
    )
    return FCOS(
        backbone=backbone,
        head=head,
        num_classes=model.num_classes,
        head_in_features=_LEVELS,
        pixel_mean=list(model.pixel_mean),
        pixel_std=list(model.pixel_std),
    )


def transpose(levels: Sequence[Tensor], channels: int) -> List[Tensor]:
    """Head outputs (N, A*D, Hi, Wi) as (N, Hi*Wi*A, D), by Detectron2's own function."""
    return [permute_to_N_HWA_K(level, channels) for level in levels]


def empty_features(grid_sizes, device) -> List[Tensor]:
    """Feature maps of given sizes without content, for anchor generators."""
    return [torch.empty(1, 0, height, width, device=device) for height, width in grid_sizes]
