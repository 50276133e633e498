"""Table 5, row 5: scale 9. The paper's AP on minival: 38.9. Parent: scale8.py."""

from .scale8 import dataloader, lr_multiplier, model, optimizer, train

model.anchor_generator.sizes.scale = 9
train.output_dir = "output/ablations/anchor_scale/scale9"
