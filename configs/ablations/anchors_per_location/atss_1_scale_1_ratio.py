"""Table 7, row 6: + ATSS, 1 scale, 1 ratio.

AP50 57.5, AP75 42.8 in the paper. Back at one square per location: it equals
coco/atss_R_50_FPN_1x.py.
"""

from .atss_3_ratios import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 7",
    number=6,
    title="+ ATSS, 1 scale, 1 ratio",
    ap=39.3,
    source="paper",
    split="minival",
    parent="ablations/anchors_per_location/atss_3_ratios",
    changes=[
        "model.anchor_generator.aspect_ratios: [0.5, 1.0, 2.0] -> [1.0]",
        "model.head.num_anchors: 3 -> 1",
    ],
)

model.anchor_generator.aspect_ratios = [1.0]
model.head.num_anchors = 1
train.output_dir = "output/ablations/anchors_per_location/atss_1_scale_1_ratio"
