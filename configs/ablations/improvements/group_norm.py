"""Table 1, row 2: + GroupNorm."""

from .retinanet_a1 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 1",
    number=2,
    title="+ GroupNorm",
    ap=33.4,
    source="paper",
    split="minival",
    parent="ablations/improvements/retinanet_a1",
    changes=['model.head.norm: "" -> "GN"'],
)

model.head.norm = "GN"
train.output_dir = "output/ablations/improvements/group_norm"
