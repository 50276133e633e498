"""Detectron2's own RetinaNet, FCOS and RPN, as configs that take the backbone of an ATSS config.

FCOS came after Detectron2 0.6, so only its main branch has it; `has_fcos` says.
"""

from typing import Dict, List

from atss.anchors import octave_sizes
from omegaconf import DictConfig
from torch import nn

import detectron2
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead

try:
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
except ImportError:
    FCOS = None

STRIDES = (8, 16, 32, 64, 128)
LEVELS = ("p3", "p4", "p5", "p6", "p7")
NO_FCOS = f"Detectron2 {detectron2.__version__} has no FCOS, only its main branch does"


def has_fcos() -> bool:
    """Whether this Detectron2 has FCOS."""
    return FCOS is not None


def retinanet(model: DictConfig) -> DictConfig:
    """RetinaNet as Detectron2's configs have it: nine anchors, smooth L1 (beta 0).

    Args:
        model: config of the ATSS detector it is compared with, for backbone, classes, channels,
            convolutions of each tower and pixel normalization.
    """
    return L(RetinaNet)(
        **_shared(model),
        head=L(RetinaNetHead)(**_shared_head(model), num_anchors=9),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=octave_sizes(STRIDES, 4, 3),
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=list(STRIDES),
            offset=0.0,
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        anchor_matcher=L(Matcher)(
            thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box_reg_loss_type="smooth_l1",
    )


def fcos(model: DictConfig) -> DictConfig:
    """FCOS as Detectron2's configs have it: center sampling 1.5, and GroupNorm as in ATSS's head.

    Args:
        model: see `retinanet`.
    """
    return L(FCOS)(**_shared(model), head=L(FCOSHead)(**_shared_head(model), norm="GN"))


def rpn(pre_nms_topk: List[int], post_nms_topk: List[int], nms_thresh: float) -> DictConfig:
    """RPN as Detectron2's FPN configs have it, to stand at `model.proposal_generator`.

    Args:
        pre_nms_topk: candidates of a level in training and in inference.
        post_nms_topk: proposals of an image in training and in inference.
        nms_thresh: IoU above which of two proposals the lower-scored one is removed.
    """
    return L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels="${...backbone.out_channels}", num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=pre_nms_topk,
        post_nms_topk=post_nms_topk,
        nms_thresh=nms_thresh,
    )


def without_network(detector: DictConfig, **changes) -> nn.Module:
    """A detector for its assignment, losses and post-processing, which need only settings.

    Args:
        detector: `retinanet` or `fcos`.
        **changes: entries of that config to replace.
    """
    detector.update(backbone=L(_FeatureShapes)(), head=L(nn.Identity)(), **changes)
    return instantiate(detector)


class _FeatureShapes(nn.Module):
    """In place of a backbone: knows the shapes of features, computes none."""

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return dict(zip(LEVELS, _feature_shapes(256)))


def _feature_shapes(channels: int) -> List[ShapeSpec]:
    return [ShapeSpec(channels=channels, stride=stride) for stride in STRIDES]


def _shared(model: DictConfig) -> dict:
    return dict(
        backbone=model.backbone,
        num_classes=model.num_classes,
        head_in_features=list(LEVELS),
        pixel_mean=model.pixel_mean,
        pixel_std=model.pixel_std,
    )


def _shared_head(model: DictConfig) -> dict:
    channels = model.backbone.out_channels
    return dict(
        input_shape=L(_feature_shapes)(channels=channels),
        num_classes=model.num_classes,
        conv_dims=[channels] * model.head.num_convs,
    )
