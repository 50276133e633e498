"""Table 6, row 2: aspect ratio 1:2.

Our reading of the paper: height to width, as in the release's generator; the area stays (8S)^2,
where the release rounds sides to whole pixels at the size of the stride.
"""

from .ratio1to1 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 6",
    number=2,
    title="aspect ratio 1:2",
    ap=39.0,
    source="paper",
    split="minival",
    parent="ablations/anchor_ratio/ratio1to1",
    changes=["model.anchor_generator.aspect_ratios: [1.0] -> [0.5]"],
)

model.anchor_generator.aspect_ratios = [0.5]
train.output_dir = "output/ablations/anchor_ratio/ratio1to2"
