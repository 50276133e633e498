"""Table 4, row 7: k = 15."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 4",
    number=7,
    title="k = 15",
    ap=39.1,
    source="paper",
    split="minival",
    parent="ablations/topk/k9",
    changes=["model.assigner.topk: 9 -> 15"],
)

model.assigner.topk = 15
train.output_dir = "output/ablations/topk/k15"
