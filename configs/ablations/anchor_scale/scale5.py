"""Table 5, row 1: scale 5. The paper's AP on minival: 39.0. Parent: scale8.py."""

from .scale8 import dataloader, lr_multiplier, model, optimizer, train

model.anchor_generator.sizes.scale = 5
train.output_dir = "output/ablations/anchor_scale/scale5"
