"""Table 6, row 2: aspect ratio 1:2. The paper's AP on minival: 39.0. Parent: ratio1to1.py.

Between the lines: height to width, as in the release's generator; the area stays (8S)^2, where the
release rounds sides to whole pixels at the size of the stride.
"""

from .ratio1to1 import dataloader, lr_multiplier, model, optimizer, train

model.anchor_generator.aspect_ratios = [0.5]
train.output_dir = "output/ablations/anchor_ratio/ratio1to2"
