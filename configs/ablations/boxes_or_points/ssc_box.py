"""Table 2, row 3: spatial and scale constraint, box.

FCOS's rule on the centres of the anchors; boxes are regressed from the 8S squares around them.
"""

from atss.assigners import SSCAssigner

from detectron2.config import LazyCall as L

from .iou_box import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 2",
    number=3,
    title="spatial and scale constraint, box",
    ap=37.8,
    source="paper",
    split="minival",
    parent="ablations/boxes_or_points/iou_box",
    changes=["model.assigner: IoUAssigner -> SSCAssigner"],
)

model.assigner = L(SSCAssigner)()
train.output_dir = "output/ablations/boxes_or_points/ssc_box"
