"""Table 1, row 6: + Scalar, one per level. The paper's AP on minival: 37.0. Parent: centerness.py.

All five improvements: what remains to FCOS are the two differences of Table 2.
"""

from .centerness import dataloader, lr_multiplier, model, optimizer, train

model.head.level_scales = True
train.output_dir = "output/ablations/improvements/level_scales"
