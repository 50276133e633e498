"""Table 3, row 3: FCOS.

AP50 55.6, AP75 40.7, APs 22.1, APm 41.8, APl 48.8 in the paper.
"""

from ..boxes_or_points.ssc_point import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 3",
    number=3,
    title="FCOS",
    ap=37.8,
    source="paper",
    split="minival",
    same_as="ablations/boxes_or_points/ssc_point",
)

train.output_dir = "output/ablations/sample_selection/fcos"
