"""Table 4, row 9: k = 19."""

from .k9 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 4",
    number=9,
    title="k = 19",
    ap=38.9,
    source="paper",
    split="minival",
    parent="ablations/topk/k9",
    changes=["model.assigner.topk: 9 -> 19"],
)

model.assigner.topk = 19
train.output_dir = "output/ablations/topk/k19"
