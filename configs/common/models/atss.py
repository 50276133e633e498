"""The full method: ATSS with every improvement on ResNet-50 (Table 3, last rows).

Each axis of the paper is one place in the package and one entry of `model`, changed in one line:

Axis 1 of 4: which anchors are positive.         `assigners/`          `model.assigner`
Axis 2 of 4: where regression starts.            `box_regression.py`   `model.box2box_transform`
Axis 3 of 4: the head and its losses.            `head.py`, `losses/`  `model.head`, `model.loss`
Axis 4 of 4: how many anchors a location has.    `anchors.py`          `model.anchor_generator`
"""

from atss.anchors import GridAnchorGenerator, octave_sizes
from atss.assigners import ATSSAssigner
from atss.backbone import resnet_fpn
from atss.box_regression import Box2BoxTransform
from atss.detector import build_detector
from atss.head import ATSSHead
from atss.losses import DenseLoss, FocalLoss
from atss.postprocessing import DetectionSelector

from detectron2.config import LazyCall as L

model = L(build_detector)(
    backbone=L(resnet_fpn)(depth=50, norm="FrozenBN", freeze_at=2, out_channels=256),
    # Axis 1
    assigner=L(ATSSAssigner)(topk=9),
    # Axis 2
    box2box_transform=L(Box2BoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
    # Axis 3
    head=L(ATSSHead)(
        in_channels="${..backbone.out_channels}",
        num_classes="${..num_classes}",
        num_anchors=1,
        num_levels=5,
        num_convs=4,
        norm="GN",
        centerness=True,
        level_scales=True,
        bbox_bias=0.0,
    ),
    loss=L(DenseLoss)(
        box2box_transform="${..box2box_transform}",
        num_classes="${..num_classes}",
        classification=L(FocalLoss)(alpha=0.25, gamma=2.0),
        box_loss="giou",
        box_loss_weight=2.0,
        quality="centerness",
    ),
    # Axis 4
    anchor_generator=L(GridAnchorGenerator)(
        sizes=L(octave_sizes)(strides="${..strides}", scale=8, scales_per_octave=1),
        aspect_ratios=[1.0],
        strides=[8, 16, 32, 64, 128],
        offset=0.5,
    ),
    num_classes=80,
    in_features=["p3", "p4", "p5", "p6", "p7"],
    selector=L(DetectionSelector)(
        score_thresh=0.05,
        topk_candidates=1000,
        nms_thresh=0.6,
        detections_per_image=100,
    ),
    # Mean of the MSRA weights; the deviation is folded into their first convolution.
    pixel_mean=[102.9801, 115.9465, 122.7717],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)
