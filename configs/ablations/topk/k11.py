"""Table 4, row 5: k = 11. The paper's AP on minival: 39.1. Parent: k9.py."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

model.assigner.topk = 11
train.output_dir = "output/ablations/topk/k11"
