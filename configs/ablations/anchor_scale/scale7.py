"""Table 5, row 3: scale 7. The paper's AP on minival: 39.3. Parent: scale8.py."""

from .scale8 import dataloader, lr_multiplier, model, optimizer, train

model.anchor_generator.sizes.scale = 7
train.output_dir = "output/ablations/anchor_scale/scale7"
