"""Table 7, row 4: + ATSS, 3 scales, 1 ratio.

AP50 57.7, AP75 42.6 in the paper.
"""

from .atss_3_scales_3_ratios import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 7",
    number=4,
    title="+ ATSS, 3 scales, 1 ratio",
    ap=39.3,
    source="paper",
    split="minival",
    parent="ablations/anchors_per_location/atss_3_scales_3_ratios",
    changes=[
        "model.anchor_generator.aspect_ratios: [0.5, 1.0, 2.0] -> [1.0]",
        "model.head.num_anchors: 9 -> 3",
    ],
)

model.anchor_generator.aspect_ratios = [1.0]
model.head.num_anchors = 3
train.output_dir = "output/ablations/anchors_per_location/atss_3_scales"
