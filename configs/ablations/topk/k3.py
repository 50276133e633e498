"""Table 4, row 1: k = 3. The paper's AP on minival: 38.0. Parent: k9.py."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

model.assigner.topk = 3
train.output_dir = "output/ablations/topk/k3"
