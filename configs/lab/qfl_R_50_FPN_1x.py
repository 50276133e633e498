"""Quality focal loss on ATSS, without a centerness branch (GFL). Not in the paper.

The class score learns the IoU of its box; box losses are weighted by the best class score.
"""

from atss.losses import QualityFocalLoss

from detectron2.config import LazyCall as L

from ..coco.atss_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.head.centerness = False
model.loss.classification = L(QualityFocalLoss)(beta=2.0)
model.loss.quality = None
model.loss.box_weighting = "score"
train.output_dir = "output/lab/qfl_R_50_FPN_1x"
