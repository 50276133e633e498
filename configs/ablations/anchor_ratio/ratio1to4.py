"""Table 6, row 1: aspect ratio 1:4.

Our reading of the paper: height to width, as in the release's generator; the area stays (8S)^2.
"""

from .ratio1to1 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 6",
    number=1,
    title="aspect ratio 1:4",
    ap=39.1,
    source="paper",
    split="minival",
    parent="ablations/anchor_ratio/ratio1to1",
    changes=["model.anchor_generator.aspect_ratios: [1.0] -> [0.25]"],
)

model.anchor_generator.aspect_ratios = [0.25]
train.output_dir = "output/ablations/anchor_ratio/ratio1to4"
