"""SimOTA in place of ATSS on the embedded shapes. Not in the paper.

Class targets are the IoU of the predicted box.
"""

from atss.assigners import SimOTAAssigner

from detectron2.config import LazyCall as L

from .atss_toy import dataloader, lr_multiplier, model, optimizer, train

model.assigner = L(SimOTAAssigner)(center_radius=1.5, candidate_topk=10, iou_weight=3.0)
train.output_dir = "output/simota_toy"
