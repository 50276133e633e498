"""Table 2, row 2: IoU, point. The paper's AP on minival: 36.9. Parent: iou_box.py.

Positives are chosen by the IoU of the same 8S squares; only regression starts from their centres.
"""

from atss.box_regression import PointToBoxTransform

from detectron2.config import LazyCall as L

from .iou_box import dataloader, lr_multiplier, model, optimizer, train

model.box2box_transform = L(PointToBoxTransform)(anchor_scale="${..anchor_generator.sizes.scale}")
model.head.bbox_bias = 4.0  # half the width of an 8-stride anchor, in strides
train.output_dir = "output/ablations/boxes_or_points/iou_point"
