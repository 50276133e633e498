"""Table 4, row 8: k = 17."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 4",
    number=8,
    title="k = 17",
    ap=39.2,
    source="paper",
    split="minival",
    parent="ablations/topk/k9",
    changes=["model.assigner.topk: 9 -> 17"],
)

model.assigner.topk = 17
train.output_dir = "output/ablations/topk/k17"
