"""Table 5, row 2: scale 6."""

from .scale8 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 5",
    number=2,
    title="scale 6",
    ap=39.2,
    source="paper",
    split="minival",
    parent="ablations/anchor_scale/scale8",
    changes=["model.anchor_generator.sizes.scale: 8 -> 6"],
)

model.anchor_generator.sizes.scale = 6
train.output_dir = "output/ablations/anchor_scale/scale6"
