"""Table 2, row 1: IoU, box."""

from ..improvements.level_scales import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 2",
    number=1,
    title="IoU, box",
    ap=37.0,
    source="paper",
    split="minival",
    same_as="ablations/improvements/level_scales",
)

train.output_dir = "output/ablations/boxes_or_points/iou_box"
