"""Table 4, row 6: k = 13."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 4",
    number=6,
    title="k = 13",
    ap=39.0,
    source="paper",
    split="minival",
    parent="ablations/topk/k9",
    changes=["model.assigner.topk: 9 -> 13"],
)

model.assigner.topk = 13
train.output_dir = "output/ablations/topk/k13"
