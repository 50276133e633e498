"""Table 2, row 1: IoU, box.

The paper's AP on minival: 37.0. Same as ../improvements/level_scales.py.
"""

from ..improvements.level_scales import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "output/ablations/boxes_or_points/iou_box"
