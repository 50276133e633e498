"""Table 7, row 1: RetinaNet (#A=9).

The paper's AP on minival: 36.3. Parent: ../improvements/retinanet_a1.py. AP50 55.2, AP75 38.8 in
the paper. RetinaNet's own anchors: three sizes from four strides, three ratios. Between the lines:
everything else is the zero point's, as in Table 1.
"""

from ..improvements.retinanet_a1 import dataloader, lr_multiplier, model, optimizer, train

model.anchor_generator.sizes.scale = 4
model.anchor_generator.sizes.scales_per_octave = 3
model.anchor_generator.aspect_ratios = [0.5, 1.0, 2.0]
model.head.num_anchors = 9
train.output_dir = "output/ablations/anchors_per_location/retinanet_a9"
