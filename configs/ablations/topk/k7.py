"""Table 4, row 3: k = 7. The paper's AP on minival: 39.1. Parent: k9.py."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

model.assigner.topk = 7
train.output_dir = "output/ablations/topk/k7"
