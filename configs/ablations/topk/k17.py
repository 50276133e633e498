"""Table 4, row 8: k = 17. The paper's AP on minival: 39.2. Parent: k9.py."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

model.assigner.topk = 17
train.output_dir = "output/ablations/topk/k17"
