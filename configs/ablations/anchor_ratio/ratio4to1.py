"""Table 6, row 5: aspect ratio 4:1.

Our reading of the paper: height to width, as in the release's generator; the area stays (8S)^2.
"""

from .ratio1to1 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 6",
    number=5,
    title="aspect ratio 4:1",
    ap=39.1,
    source="paper",
    split="minival",
    parent="ablations/anchor_ratio/ratio1to1",
    changes=["model.anchor_generator.aspect_ratios: [1.0] -> [4.0]"],
)

model.anchor_generator.aspect_ratios = [4.0]
train.output_dir = "output/ablations/anchor_ratio/ratio4to1"
