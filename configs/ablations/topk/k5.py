"""Table 4, row 2: k = 5. The paper's AP on minival: 38.8. Parent: k9.py."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

model.assigner.topk = 5
train.output_dir = "output/ablations/topk/k5"
