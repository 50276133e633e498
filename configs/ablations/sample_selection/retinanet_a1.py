"""Table 3, row 1: RetinaNet (#A=1).

AP50 55.1, AP75 39.9, APs 21.4, APm 41.2, APl 48.6 in the paper. With all improvements of Table 1.
"""

from ..improvements.level_scales import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 3",
    number=1,
    title="RetinaNet (#A=1)",
    ap=37.0,
    source="paper",
    split="minival",
    same_as="ablations/improvements/level_scales",
)

train.output_dir = "output/ablations/sample_selection/retinanet_a1"
