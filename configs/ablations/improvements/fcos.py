"""Table 1, row 7: FCOS. The paper's AP on minival: 37.8. Same as ../boxes_or_points/ssc_point.py.

FCOS with the improvements that came after its paper; its points lie in objects by definition.
"""

from ..boxes_or_points.ssc_point import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "output/ablations/improvements/fcos"
