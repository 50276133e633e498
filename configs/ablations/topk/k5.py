"""Table 4, row 2: k = 5."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 4",
    number=2,
    title="k = 5",
    ap=38.8,
    source="paper",
    split="minival",
    parent="ablations/topk/k9",
    changes=["model.assigner.topk: 9 -> 5"],
)

model.assigner.topk = 5
train.output_dir = "output/ablations/topk/k5"
