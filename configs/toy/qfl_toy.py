"""Quality focal loss on the embedded shapes, without a centerness branch. Not in the paper.

The class score learns the IoU of its box; box losses are weighted by the best class score.
"""

from atss.losses import QualityFocalLoss

from detectron2.config import LazyCall as L

from .atss_toy import dataloader, lr_multiplier, model, optimizer, train

model.head.centerness = False
model.loss.classification = L(QualityFocalLoss)(beta=2.0)
model.loss.quality = None
model.loss.box_weighting = "score"
train.output_dir = "output/qfl_toy"
