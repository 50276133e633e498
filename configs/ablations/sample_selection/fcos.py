"""Table 3, row 3: FCOS. The paper's AP on minival: 37.8. Same as ../boxes_or_points/ssc_point.py.

AP50 55.6, AP75 40.7, APs 22.1, APm 41.8, APl 48.8 in the paper.
"""

from ..boxes_or_points.ssc_point import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "output/ablations/sample_selection/fcos"
