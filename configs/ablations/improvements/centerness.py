"""Table 1, row 5: + Centerness. The paper's AP on minival: 36.8. Parent: in_gt_box.py.

With the branch the box loss of a positive is weighted by its centerness target, as in FCOS.
"""

from .in_gt_box import dataloader, lr_multiplier, model, optimizer, train

model.head.centerness = True
train.output_dir = "output/ablations/improvements/centerness"
