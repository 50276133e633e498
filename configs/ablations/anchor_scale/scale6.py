"""Table 5, row 2: scale 6. The paper's AP on minival: 39.2. Parent: scale8.py."""

from .scale8 import dataloader, lr_multiplier, model, optimizer, train

model.anchor_generator.sizes.scale = 6
train.output_dir = "output/ablations/anchor_scale/scale6"
