"""Table 2, row 2: IoU, point.

Positives are chosen by the IoU of the same 8S squares; only regression starts from their centres.
"""

from atss.box_regression import PointToBoxTransform

from detectron2.config import LazyCall as L

from .iou_box import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 2",
    number=2,
    title="IoU, point",
    ap=36.9,
    source="paper",
    split="minival",
    parent="ablations/boxes_or_points/iou_box",
    changes=[
        "model.box2box_transform: Box2BoxTransform -> PointToBoxTransform",
        "model.head.bbox_bias: 0.0 -> 4.0",
    ],
)

model.box2box_transform = L(PointToBoxTransform)(anchor_scale="${..anchor_generator.sizes.scale}")
model.head.bbox_bias = 4.0  # half the width of an 8-stride anchor, in strides
train.output_dir = "output/ablations/boxes_or_points/iou_point"
