"""Table 7, row 1: RetinaNet (#A=9).

AP50 55.2, AP75 38.8 in the paper. RetinaNet's own anchors: three sizes from four strides, three
ratios. Our reading of the paper: everything else as in the zero point of Table 1.
"""

from ..improvements.retinanet_a1 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 7",
    number=1,
    title="RetinaNet (#A=9)",
    ap=36.3,
    source="paper",
    split="minival",
    parent="ablations/improvements/retinanet_a1",
    changes=[
        "model.anchor_generator.sizes.scale: 8 -> 4",
        "model.anchor_generator.sizes.scales_per_octave: 1 -> 3",
        "model.anchor_generator.aspect_ratios: [1.0] -> [0.5, 1.0, 2.0]",
        "model.head.num_anchors: 1 -> 9",
    ],
)

model.anchor_generator.sizes.scale = 4
model.anchor_generator.sizes.scales_per_octave = 3
model.anchor_generator.aspect_ratios = [0.5, 1.0, 2.0]
model.head.num_anchors = 9
train.output_dir = "output/ablations/anchors_per_location/retinanet_a9"
