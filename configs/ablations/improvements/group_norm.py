"""Table 1, row 2: + GroupNorm. The paper's AP on minival: 33.4. Parent: retinanet_a1.py."""

from .retinanet_a1 import dataloader, lr_multiplier, model, optimizer, train

model.head.norm = "GN"
train.output_dir = "output/ablations/improvements/group_norm"
