"""Table 7, row 5: + ATSS, 1 scale, 3 ratios.

The paper's AP on minival: 39.2. Parent: atss_3_scales_3_ratios.py. AP50 57.1, AP75 42.5 in the
paper.
"""

from .atss_3_scales_3_ratios import dataloader, lr_multiplier, model, optimizer, train

model.anchor_generator.sizes.scales_per_octave = 1
model.head.num_anchors = 3
train.output_dir = "output/ablations/anchors_per_location/atss_3_ratios"
