"""SimOTA in place of ATSS, everything else as in the paper. Not in the paper.

The rule of YOLOX (Sec. 2.1) with its settings. Class targets are the IoU of the predicted box.
"""

from atss.assigners import SimOTAAssigner

from detectron2.config import LazyCall as L

from ..coco.atss_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.assigner = L(SimOTAAssigner)(center_radius=1.5, candidate_topk=10, iou_weight=3.0)
train.output_dir = "output/lab/simota_R_50_FPN_1x"
