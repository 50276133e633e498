"""Table 7, row 4: + ATSS, 3 scales, 1 ratio.

The paper's AP on minival: 39.3. Parent: atss_3_scales_3_ratios.py. AP50 57.7, AP75 42.6 in the
paper.
"""

from .atss_3_scales_3_ratios import dataloader, lr_multiplier, model, optimizer, train

model.anchor_generator.aspect_ratios = [1.0]
model.head.num_anchors = 3
train.output_dir = "output/ablations/anchors_per_location/atss_3_scales"
