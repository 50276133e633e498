"""Table 4, row 1: k = 3."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 4",
    number=1,
    title="k = 3",
    ap=38.0,
    source="paper",
    split="minival",
    parent="ablations/topk/k9",
    changes=["model.assigner.topk: 9 -> 3"],
)

model.assigner.topk = 3
train.output_dir = "output/ablations/topk/k3"
