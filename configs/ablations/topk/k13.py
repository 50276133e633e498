"""Table 4, row 6: k = 13. The paper's AP on minival: 39.0. Parent: k9.py."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

model.assigner.topk = 13
train.output_dir = "output/ablations/topk/k13"
