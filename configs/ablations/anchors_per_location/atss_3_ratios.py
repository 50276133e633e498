"""Table 7, row 5: + ATSS, 1 scale, 3 ratios.

AP50 57.1, AP75 42.5 in the paper.
"""

from .atss_3_scales_3_ratios import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 7",
    number=5,
    title="+ ATSS, 1 scale, 3 ratios",
    ap=39.2,
    source="paper",
    split="minival",
    parent="ablations/anchors_per_location/atss_3_scales_3_ratios",
    changes=[
        "model.anchor_generator.sizes.scales_per_octave: 3 -> 1",
        "model.head.num_anchors: 9 -> 3",
    ],
)

model.anchor_generator.sizes.scales_per_octave = 1
model.head.num_anchors = 3
train.output_dir = "output/ablations/anchors_per_location/atss_3_ratios"
