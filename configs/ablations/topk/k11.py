"""Table 4, row 5: k = 11."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 4",
    number=5,
    title="k = 11",
    ap=39.1,
    source="paper",
    split="minival",
    parent="ablations/topk/k9",
    changes=["model.assigner.topk: 9 -> 11"],
)

model.assigner.topk = 11
train.output_dir = "output/ablations/topk/k11"
