"""Table 2, row 4: spatial and scale constraint, point.

The paper's AP on minival: 37.8. Parent: iou_point.py. This is FCOS.
"""

from atss.assigners import SSCAssigner

from detectron2.config import LazyCall as L

from .iou_point import dataloader, lr_multiplier, model, optimizer, train

model.assigner = L(SSCAssigner)()
train.output_dir = "output/ablations/boxes_or_points/ssc_point"
