"""Table 1, row 3: + GIoU loss. The paper's AP on minival: 34.9. Parent: group_norm.py.

Between the lines: weight 2 as in the full method, per positive while there is no centerness.
"""

from .group_norm import dataloader, lr_multiplier, model, optimizer, train

model.loss.box_loss = "giou"
model.loss.box_loss_weight = 2.0
train.output_dir = "output/ablations/improvements/giou"
