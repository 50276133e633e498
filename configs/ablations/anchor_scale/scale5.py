"""Table 5, row 1: scale 5."""

from .scale8 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 5",
    number=1,
    title="scale 5",
    ap=39.0,
    source="paper",
    split="minival",
    parent="ablations/anchor_scale/scale8",
    changes=["model.anchor_generator.sizes.scale: 8 -> 5"],
)

model.anchor_generator.sizes.scale = 5
train.output_dir = "output/ablations/anchor_scale/scale5"
