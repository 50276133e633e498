"""Table 5, row 3: scale 7."""

from .scale8 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 5",
    number=3,
    title="scale 7",
    ap=39.3,
    source="paper",
    split="minival",
    parent="ablations/anchor_scale/scale8",
    changes=["model.anchor_generator.sizes.scale: 8 -> 7"],
)

model.anchor_generator.sizes.scale = 7
train.output_dir = "output/ablations/anchor_scale/scale7"
