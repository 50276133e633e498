"""Table 4, row 3: k = 7."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 4",
    number=3,
    title="k = 7",
    ap=39.1,
    source="paper",
    split="minival",
    parent="ablations/topk/k9",
    changes=["model.assigner.topk: 9 -> 7"],
)

model.assigner.topk = 7
train.output_dir = "output/ablations/topk/k7"
