"""Table 2, row 4: spatial and scale constraint, point.

This is FCOS.
"""

from atss.assigners import SSCAssigner

from detectron2.config import LazyCall as L

from .iou_point import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 2",
    number=4,
    title="spatial and scale constraint, point",
    ap=37.8,
    source="paper",
    split="minival",
    parent="ablations/boxes_or_points/iou_point",
    changes=["model.assigner: IoUAssigner -> SSCAssigner"],
)

model.assigner = L(SSCAssigner)()
train.output_dir = "output/ablations/boxes_or_points/ssc_point"
