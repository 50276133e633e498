"""Table 4, row 9: k = 19. The paper's AP on minival: 38.9. Parent: k9.py."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

model.assigner.topk = 19
train.output_dir = "output/ablations/topk/k19"
