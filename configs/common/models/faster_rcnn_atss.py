"""Faster R-CNN whose first stage is ATSS in place of an RPN. Not in the paper.

The second stage is Detectron2's: ROIAlign on P2 to P5, two fully connected layers.
"""

from atss.anchors import GridAnchorGenerator, octave_sizes
from atss.assigners import ATSSAssigner
from atss.backbone import resnet_fpn
from atss.head import ATSSHead
from atss.losses import DenseLoss
from atss.postprocessing import ProposalSelector
from atss.proposal_generator import ATSS

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    StandardROIHeads,
)

model = L(GeneralizedRCNN)(
    backbone=L(resnet_fpn)(
        depth=50,
        norm="FrozenBN",
        freeze_at=2,
        out_channels=256,
        in_features=["res2", "res3", "res4", "res5"],
    ),
    proposal_generator=L(ATSS)(
        head=L(ATSSHead)(
            in_channels="${...backbone.out_channels}",
            num_classes=1,
            num_anchors=1,
            num_levels=5,
            num_convs=4,
            norm="GN",
            centerness=True,
        ),
        anchor_generator=L(GridAnchorGenerator)(
            sizes=L(octave_sizes)(strides="${..strides}", scale=8, scales_per_octave=1),
            aspect_ratios=[1.0],
            strides=[8, 16, 32, 64, 128],
            offset=0.5,
        ),
        assigner=L(ATSSAssigner)(topk=9),
        box2box_transform=L(Box2BoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
        loss=L(DenseLoss)(
            box2box_transform="${..box2box_transform}",
            num_classes=1,
            quality="centerness",
        ),
        num_classes=1,
        in_features=["p3", "p4", "p5", "p6", "p7"],
        selector=L(ProposalSelector)(
            pre_nms_topk=[2000, 1000],
            post_nms_topk=[1000, 1000],
            nms_thresh=0.7,
        ),
    ),
    roi_heads=L(StandardROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=L(ROIPooler)(
            output_size=7,
            scales=[1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32],
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=L(ShapeSpec)(channels="${....backbone.out_channels}", height=7, width=7),
            conv_dims=[],
            fc_dims=[1024, 1024],
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels="${...box_head.fc_dims.1}"),
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
            num_classes="${..num_classes}",
        ),
    ),
    pixel_mean=[102.9801, 115.9465, 122.7717],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)
