"""Table 7, row 2: + Imprs. The paper's AP on minival: 38.4. Parent: retinanet_a9.py.

AP50 56.2, AP75 41.6 in the paper. All improvements of Table 1 at once.
"""

from .retinanet_a9 import dataloader, lr_multiplier, model, optimizer, train

model.head.norm = "GN"
model.head.centerness = True
model.head.level_scales = True
model.loss.box_loss = "giou"
model.loss.box_loss_weight = 2.0
model.assigner.center_in_gt = True
train.output_dir = "output/ablations/anchors_per_location/retinanet_a9_improved"
