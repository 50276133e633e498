"""Table 6, row 5: aspect ratio 4:1. The paper's AP on minival: 39.1. Parent: ratio1to1.py.

Between the lines: height to width, as in the release's generator; the area stays (8S)^2.
"""

from .ratio1to1 import dataloader, lr_multiplier, model, optimizer, train

model.anchor_generator.aspect_ratios = [4.0]
train.output_dir = "output/ablations/anchor_ratio/ratio4to1"
