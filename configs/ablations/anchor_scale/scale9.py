"""Table 5, row 5: scale 9."""

from .scale8 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 5",
    number=5,
    title="scale 9",
    ap=38.9,
    source="paper",
    split="minival",
    parent="ablations/anchor_scale/scale8",
    changes=["model.anchor_generator.sizes.scale: 8 -> 9"],
)

model.anchor_generator.sizes.scale = 9
train.output_dir = "output/ablations/anchor_scale/scale9"
